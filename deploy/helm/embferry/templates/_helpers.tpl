{{/* Names and labels. A part is router, bootstrap, encode or language. */}}
{{- define "embferry.name" -}}
{{- $name := ternary .Release.Name (printf "%s-embferry" .Release.Name) (contains "embferry" .Release.Name) -}}
{{ if gt (len $name) 40 }}{{ $name | trunc 31 | trimSuffix "-" }}-{{ sha256sum $name | trunc 8 }}{{ else }}{{ $name }}{{ end -}}
{{- end }}

{{- define "embferry.partName" -}}
{{ include "embferry.name" .root }}-{{ .part }}
{{- end }}

{{- define "embferry.selector" -}}
app.kubernetes.io/name: embferry
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
{{- with .part }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{- define "embferry.labels" -}}
{{ include "embferry.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "embferry.scheme" -}}
{{ if .Values.tls.secretName }}https{{ else }}http{{ end }}
{{- end }}

{{/* The host of a part's Service, as certificates have it. */}}
{{- define "embferry.host" -}}
{{ include "embferry.partName" . }}.{{ .root.Release.Namespace }}.svc
{{- end }}

{{- define "embferry.servedName" -}}
{{ .Values.model.servedName | default (base .Values.model.name) }}
{{- end }}

{{/* How many pods of a role there may be: the router before vLLM has a URL for each. */}}
{{- define "embferry.most" -}}
{{- $own := index .root.Values .part -}}
{{ if .root.Values.scaling.enabled }}{{ $own.scaling.max }}{{ else }}{{ $own.replicas }}{{ end }}
{{- end }}

{{- define "embferry.urls" -}}
{{- $context := . -}}
{{- $urls := list -}}
{{- range $number := until (include "embferry.most" . | int) -}}
{{- $urls = append $urls (printf "http://%s-%d.%s:%d" (include "embferry.partName" $context) $number (include "embferry.host" $context) (index $context.root.Values $context.part "port" | int)) -}}
{{- end -}}
{{ toJson $urls }}
{{- end }}

{{/* The settings file of router, bootstrap server and our own workers. */}}
{{- define "embferry.settings" -}}
{{- $root := dict "root" . -}}
{{- $own := dict
  "model" .Values.model.name
  "host" .Values.host
  "log_format" "json"
  "router" (dict "port" .Values.router.port "engine" .Values.engine "served_model_name" (include "embferry.servedName" .))
-}}
{{- if .Values.keys.apiKeysFile }}{{ $_ := set $own.router "api_keys_file" "/etc/embferry/keys/api-keys" }}{{ end -}}
{{- if eq .Values.engine "vllm" -}}
{{- $_ := set $own "vllm" (dict
  "encode_urls" (include "embferry.urls" (merge (dict "part" "encode") $root) | fromJsonArray)
  "language_urls" (include "embferry.urls" (merge (dict "part" "language") $root) | fromJsonArray)
) -}}
{{- else -}}
{{- $_ := set $own "bootstrap_url" (printf "%s://%s:%d" (include "embferry.scheme" .) (include "embferry.host" (merge (dict "part" "bootstrap") $root)) (int .Values.bootstrap.port)) -}}
{{- $_ := set $own "bootstrap" (dict "port" .Values.bootstrap.port) -}}
{{- $_ := set $own "encode" (dict "port" .Values.encode.port) -}}
{{- $_ := set $own "language" (dict "port" .Values.language.port) -}}
{{- $_ := set $own "transfer" (dict "transports" .Values.transports) -}}
{{- end -}}
{{ mustMergeOverwrite $own (deepCopy (.Values.settings | default dict)) | toYaml }}
{{- end }}

{{/* Variables that every part has: the keys, and the certificate. */}}
{{- define "embferry.trust" -}}
- {name: EMBFERRY_HOST, value: {{ .Values.host | quote }}}
- {name: EMBFERRY_CLUSTER_KEY_FILE, value: /etc/embferry/keys/cluster-key}
{{- if .Values.tls.secretName }}
- {name: EMBFERRY_TLS_CA, value: /etc/embferry/tls/ca.crt}
- {name: EMBFERRY_TLS_CERT, value: /etc/embferry/tls/tls.crt}
- {name: EMBFERRY_TLS_KEY, value: /etc/embferry/tls/tls.key}
- {name: EMBFERRY_TLS_CHECK_HOSTS, value: "0"}  # pods have new addresses each time, and a certificate cannot list them
{{- end }}
- {name: HOME, value: /cache}
- {name: USER, value: embferry}
{{- end }}

{{- define "embferry.configFile" -}}
- {name: EMBFERRY_CONFIG, value: /etc/embferry/settings/settings.yaml}
{{- end }}

{{- define "embferry.routerUrl" -}}
{{ include "embferry.scheme" .root }}://{{ include "embferry.host" (dict "root" .root "part" "router") }}:{{ .root.Values.router.port }}
{{- end }}

{{/* The words of `vllm serve`, as `embferry serve --engine vllm` makes them. */}}
{{- define "embferry.vllmArguments" -}}
{{- $values := .root.Values -}}
{{- $connector := dict "transports" $values.transports "host" $values.host "advertise" "$(EMBFERRY_ADVERTISE_HOST)" "metrics_port" $values.vllm.metricsPort -}}
{{- $traces := dig "traces" "endpoint" "" ($values.settings | default dict) -}}
{{- if eq .part "encode" -}}
{{- if dig "cache" "url" "" ($values.settings | default dict) }}{{ $_ := set $connector "cache" $values.settings.cache }}{{ end -}}
{{- else -}}
{{- $_ := set $connector "router" (include "embferry.routerUrl" .) -}}
{{- if $traces }}{{ $_ := set $connector "traces_endpoint" $traces }}{{ end -}}
{{- end -}}
{{- $transfer := dict
  "ec_connector" "EmbferryConnector"
  "ec_connector_module_path" "embferry.connectors.vllm.connector"
  "ec_role" (ternary "ec_producer" "ec_consumer" (eq .part "encode"))
  "ec_connector_extra_config" (mustMergeOverwrite $connector (deepCopy ($values.vllm.connector | default dict)))
-}}
{{- $words := list "serve" (include "embferry.literal" $values.model.name) "--served-model-name" (include "embferry.servedName" .root | include "embferry.literal") "--host" $values.host "--port" (toString $values.encode.port) -}}
{{- if eq .part "language" }}{{ $words = concat (initial $words) (list (toString $values.language.port) "--enable-mm-embeds") }}{{ end -}}
{{- if $traces }}{{ $words = concat $words (list "--otlp-traces-endpoint" (include "embferry.tracesUrl" $traces)) }}{{ end -}}
{{- $gpus := index $values .part "gpus" | int -}}
{{- if gt $gpus 1 }}{{ $words = concat $words (list "--tensor-parallel-size" (toString $gpus)) }}{{ end -}}
{{- $words = concat $words (list "--middleware" "embferry.serve.vllm.instance_digests.InstanceDigests" "--ec-transfer-config" (toJson $transfer)) -}}
{{- concat $words ($values.vllm.extraArgs | default list) (index $values.vllm (printf "%sArgs" .part) | default list) | toJson -}}
{{- end }}

{{/* A text that stands in arguments as it is: Kubernetes puts the value of a variable in place of $(NAME) there. */}}
{{- define "embferry.literal" -}}
{{ replace "$(" "$$(" . }}
{{- end }}

{{- define "embferry.tracesUrl" -}}
{{- $parts := urlParse . -}}
{{ if $parts.path }}{{ . }}{{ else }}{{ . }}/v1/traces{{ end }}
{{- end }}

{{- define "embferry.hub" -}}
- {name: HF_HOME, value: /cache/huggingface}
{{- with .Values.model.hubSecret }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: token}}
{{- end }}
{{- end }}

{{/* The address by which other pods reach this one. */}}
{{- define "embferry.advertised" -}}
- name: EMBFERRY_ADVERTISE_HOST
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- end }}

{{- define "embferry.apiKey" -}}
- name: {{ .name }}
  valueFrom: {secretKeyRef: {name: {{ .root.Values.keys.secretName | quote }}, key: api-key}}
{{- end }}

{{/* The variables that the chart gives to a part. */}}
{{- define "embferry.ownEnv" -}}
{{- $isWorker := has .part (list "encode" "language") -}}
{{- if $isWorker }}{{ include "embferry.advertised" . }}
{{ end -}}
{{ include "embferry.trust" .root }}
{{- if $isWorker }}
{{ include "embferry.hub" .root }}
{{- else if .root.Values.tls.secretName }}
- {name: EMBFERRY_ADVERTISE_HOST, value: {{ include "embferry.host" . }}}
{{- end }}
{{- if eq .part "router" }}
{{ include "embferry.apiKey" (dict "root" .root "name" "EMBFERRY_ROUTER_API_KEY") }}
{{- end }}
{{- if eq .engine "vllm" }}
{{ include "embferry.apiKey" (dict "root" .root "name" "VLLM_API_KEY") }}
{{- if dig "traces" "endpoint" "" (.root.Values.settings | default dict) }}
- {name: OTEL_EXPORTER_OTLP_TRACES_PROTOCOL, value: http/protobuf}
- {name: OTEL_SERVICE_NAME, value: vllm-{{ .part }}}
{{- end }}
{{- else }}
{{ include "embferry.configFile" .root }}
{{- end }}
{{- end }}

{{- define "embferry.env" -}}
{{ include "embferry.ownEnv" . }}
{{- with (index .root.Values .part).env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "embferry.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* What all pods have. No service links: the variables of a Service named embferry-router would be read as settings. */}}
{{- define "embferry.pod" -}}
{{- $own := index .root.Values .part -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.serviceAccountName }}
serviceAccountName: {{ . | quote }}
{{- end }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .root.Values.user }}
  runAsGroup: {{ .root.Values.user }}
  fsGroup: {{ .root.Values.user }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with $own.nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with $own.tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with $own.affinity }}
affinity: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with $own.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with $own.runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{ include "embferry.selector" . | nindent 8 }}
{{- end }}

{{- define "embferry.podMetadata" -}}
{{- $own := index .root.Values .part -}}
labels:
  {{- include "embferry.labels" . | nindent 2 }}
  {{- with .root.Values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  {{- if eq .engine "embferry" }}
  checksum/settings: {{ include "embferry.settings" .root | sha256sum }}
  {{- end }}
  {{- if .root.Values.metrics.annotations }}
  prometheus.io/scrape: "true"
  prometheus.io/port: {{ $own.port | quote }}
  prometheus.io/path: /metrics
  prometheus.io/scheme: {{ if eq .engine "vllm" }}http{{ else }}{{ include "embferry.scheme" .root }}{{ end }}
  {{- end }}
  {{- with $own.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "embferry.mounts" -}}
- {name: keys, mountPath: /etc/embferry/keys, readOnly: true}
{{- if .root.Values.tls.secretName }}
- {name: tls, mountPath: /etc/embferry/tls, readOnly: true}
{{- end }}
{{- if eq .engine "embferry" }}
- {name: settings, mountPath: /etc/embferry/settings, readOnly: true}
{{- end }}
- {name: tmp, mountPath: /tmp}
- {name: cache, mountPath: /cache}
{{- end }}

{{/* Secrets come with group reading for `user`: the processes are not root, and root owns the files. */}}
{{- define "embferry.volumes" -}}
- name: keys
  secret:
    secretName: {{ .root.Values.keys.secretName | quote }}
    defaultMode: 0440
    items:
      - {key: cluster-key, path: cluster-key}
      {{- if and .root.Values.keys.apiKeysFile (eq .part "router") }}
      - {key: api-keys, path: api-keys}
      {{- end }}
{{- with .root.Values.tls.secretName }}
- name: tls
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0440
    items:
      - {key: ca.crt, path: ca.crt}
      - {key: tls.crt, path: tls.crt}
      - {key: tls.key, path: tls.key}
{{- end }}
{{- if eq .engine "embferry" }}
- name: settings
  configMap: {name: {{ include "embferry.name" .root }}-settings}
{{- end }}
- name: tmp
  emptyDir: {}
- name: cache
  {{- if and .root.Values.model.cacheClaim (has .part (list "encode" "language")) }}
  persistentVolumeClaim: {claimName: {{ .root.Values.model.cacheClaim | quote }}}
  {{- else }}
  emptyDir: {sizeLimit: {{ .root.Values.model.cacheSize | quote }}}
  {{- end }}
{{- end }}

{{/* The health check of a part. Behind TLS, our own parts answer only those that show a certificate of the cluster. */}}
{{- define "embferry.check" -}}
{{- if and .root.Values.tls.secretName (eq .engine "embferry") (ne .part "router") -}}
exec: {command: [embferry, probe, "127.0.0.1:{{ index .root.Values .part "port" }}{{ .path }}"]}
{{- else -}}
httpGet: {path: {{ .path }}, port: http, scheme: {{ if eq .engine "vllm" }}HTTP{{ else }}{{ include "embferry.scheme" .root | upper }}{{ end }}}
{{- end -}}
{{- end }}

{{- define "embferry.probes" -}}
startupProbe:
  {{ include "embferry.check" (merge (dict "path" "/health") .) }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ div .startupSeconds 5 }}
livenessProbe:
  {{ include "embferry.check" (merge (dict "path" "/health") .) }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  {{ include "embferry.check" (merge (dict "path" .ready) .) }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 3
{{- end }}

{{/* The image of a container. Both have one tag, so that an upgrade changes both; vllm.image.tag is for another. */}}
{{- define "embferry.image" -}}
{{- $values := .root.Values -}}
{{- $image := ternary $values.vllm.image $values.image (eq .engine "vllm") -}}
image: "{{ $image.repository }}:{{ $image.tag | default $values.image.tag | default .root.Chart.AppVersion }}"
imagePullPolicy: {{ $image.pullPolicy }}
{{- end }}
