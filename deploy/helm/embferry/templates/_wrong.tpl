{{/* Values that cannot work, each with a sentence that says what to do. The schema refuses names and types. */}}

{{/* Ends the rendering with every sentence about wrong values. The first manifest includes it. */}}
{{- define "embferry.refuseWrongValues" -}}
{{- $wrong := list -}}
{{- range list "images" "engine" "quantities" "pods" "owned" -}}
{{- $wrong = concat $wrong (include (printf "embferry.wrong.%s" .) $ | fromJsonArray) -}}
{{- end -}}
{{- if $wrong }}{{ fail (printf "values that cannot work:\n  - %s" (join "\n  - " $wrong)) }}{{ end -}}
{{- end }}

{{- define "embferry.wrong.images" -}}
{{- $wrong := list -}}
{{- range $place, $image := dict "image" .Values.image "vllm.image" .Values.vllm.image -}}
{{- if contains "@" $image.repository -}}
{{- $wrong = append $wrong (printf "%s.repository: %q contains a digest; give it with the tag, as %s.tag=TAG@sha256:…" $place $image.repository $place) -}}
{{- else if contains ":" (base $image.repository) -}}
{{- $wrong = append $wrong (printf "%s.repository: %q contains a tag; give it as %s.tag=%s" $place $image.repository $place (base $image.repository | splitList ":" | last)) -}}
{{- end -}}
{{- if not (regexMatch "^([A-Za-z0-9_][A-Za-z0-9_.-]*(@sha256:[0-9a-f]{64})?)?$" $image.tag) -}}
{{- $wrong = append $wrong (printf "%s.tag: %q is no tag; it is what stands behind the colon in the image's name, such as 0.2.0 or 0.2.0@sha256:…" $place $image.tag) -}}
{{- end -}}
{{- end -}}
{{ toJson $wrong }}
{{- end }}

{{/* A device of the node by Kubernetes' name, such as amd.com/gpu, counts as an answer to how many GPUs there are. */}}
{{- define "embferry.wrong.engine" -}}
{{- $wrong := list -}}
{{- $vllm := eq .Values.engine "vllm" -}}
{{- range $part := list "encode" "language" -}}
{{- $own := index $.Values $part -}}
{{- $devices := list -}}
{{- range $name, $_ := ($own.resources | default dict).limits }}{{ if contains "/" $name }}{{ $devices = append $devices $name }}{{ end }}{{ end -}}
{{- if and (not $vllm) $own.gpus -}}
{{- $wrong = append $wrong (printf "%s.gpus: our own engine computes on CPUs; leave it out, or set engine=vllm" $part) -}}
{{- else if and $vllm (kindIs "invalid" $own.gpus) (not $devices) -}}
{{- $wrong = append $wrong (printf "%s.gpus: say how many GPUs each pod has; with 0, vLLM has to be a build for CPUs" $part) -}}
{{- end -}}
{{- end -}}
{{- if and $vllm (eq .Values.model.name "shapes") -}}
{{- $wrong = append $wrong "model.name: vLLM cannot serve the packaged model shapes; name one of the Hugging Face Hub, such as Qwen/Qwen2.5-VL-3B-Instruct, or a folder in the volume model.claim" -}}
{{- end -}}
{{- if and $vllm (gt (int .Values.router.replicas) 1) -}}
{{- $wrong = append $wrong "router.replicas: instances of vLLM report to one router; leave it at 1" -}}
{{- end -}}
{{ toJson $wrong }}
{{- end }}

{{/* Its amount as a number; nothing for what Kubernetes would not read as a quantity. */}}
{{- define "embferry.amount" -}}
{{- $text := toString . -}}
{{- if regexMatch "^([0-9]+(\\.[0-9]*)?|\\.[0-9]+)([numkMGTPE]|[KMGTPE]i|[eE][+-]?[0-9]+)?$" $text -}}
{{- $number := regexFind "^[0-9.]+([eE][+-]?[0-9]+)?" $text -}}
{{- $factors := dict "n" 1e-9 "u" 1e-6 "m" 1e-3 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "Pi" 1125899906842624 "Ei" 1152921504606846976 -}}
{{ mulf (float64 $number) (index $factors (trimPrefix $number $text) | default 1) }}
{{- end -}}
{{- end }}

{{- define "embferry.wrong.quantities" -}}
{{- $wrong := list -}}
{{- $places := dict "model.cacheSize" .Values.model.cacheSize "vllm.sharedMemory" .Values.vllm.sharedMemory -}}
{{- range $part := list "router" "bootstrap" "encode" "language" -}}
{{- $resources := (index $.Values $part).resources | default dict -}}
{{- range $kind := list "requests" "limits" -}}
{{- range $name, $value := index $resources $kind -}}
{{- $_ := set $places (printf "%s.resources.%s.%s" $part $kind $name) $value -}}
{{- end -}}
{{- end -}}
{{- range $name, $request := $resources.requests -}}
{{- $limit := index ($resources.limits | default dict) $name -}}
{{- $least := include "embferry.amount" $request -}}
{{- $most := include "embferry.amount" $limit -}}
{{- if and $least $most (gt (float64 $least) (float64 $most)) -}}
{{- $wrong = append $wrong (printf "%s.resources.limits.%s: the limit %v is below the request %v; raise it, or lower requests.%s" $part $name $limit $request $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $place, $value := $places -}}
{{- if not (include "embferry.amount" $value) -}}
{{- $wrong = append $wrong (printf "%s: %q is no quantity of Kubernetes; write a number with a unit such as Mi, Gi, M or G, without a B" $place (toString $value)) -}}
{{- end -}}
{{- end -}}
{{ toJson $wrong }}
{{- end }}

{{- define "embferry.wrong.pods" -}}
{{- $wrong := list -}}
{{- if contains "." .Release.Name -}}
{{- $wrong = append $wrong (printf "the release %s has a dot in its name, which names of Services may not have; choose another name" .Release.Name) -}}
{{- end -}}
{{- range $key, $_ := .Values.podLabels -}}
{{- if regexMatch "^(app[.]kubernetes[.]io|helm[.]sh)/" $key -}}
{{- $wrong = append $wrong (printf "podLabels.%s: the chart sets labels of this kind; choose another name" $key) -}}
{{- end -}}
{{- end -}}
{{- if eq (join "," .Values.transports) "shm" -}}
{{- $wrong = append $wrong "transports: shm works within a pod only; add one that works between pods, such as tcp" -}}
{{- end -}}
{{- range $part := list "encode" "language" -}}
{{- $own := index $.Values $part -}}
{{- if gt (int $own.scaling.min) (int $own.scaling.max) -}}
{{- $wrong = append $wrong (printf "%s.scaling: min %v is more than max %v" $part $own.scaling.min $own.scaling.max) -}}
{{- end -}}
{{- $others := dict -}}
{{- if eq $.Values.engine "vllm" -}}
{{- $others = dict "vllm.metricsPort" $.Values.vllm.metricsPort "vllm.connector.ranks_port" (dig "ranks_port" 0 ($.Values.vllm.connector | default dict)) -}}
{{- else if eq $part "encode" -}}
{{- $others = dict "settings.transfer.http_port" (dig "transfer" "http_port" 0 ($.Values.settings | default dict)) -}}
{{- end -}}
{{- $known := dict (toString (int $own.port)) (printf "%s.port" $part) -}}
{{- range $place, $port := $others -}}
{{- if int $port -}}
{{- $number := toString (int $port) -}}
{{- with index $known $number -}}
{{- $wrong = append $wrong (printf "%s: %s is also %s, in the same pod; choose another port" $place $number .) -}}
{{- end -}}
{{- $_ := set $known $number $place -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{ toJson (uniq $wrong) }}
{{- end }}

{{/* Settings that the chart makes of its values, or of Secrets, and what to use in their place. */}}
{{- define "embferry.ownedSettings" -}}
config: use settings
model: use model.name
host: use the value host
advertise_host: leave it out; each pod has its own address
bootstrap_url: leave it out; bootstrap.port chooses the port
cluster_key: put it into the Secret keys.secretName, as cluster-key
cluster_key_file: put the key into the Secret keys.secretName, as cluster-key
security.cluster_key: put it into the Secret keys.secretName, as cluster-key
security.cluster_key_file: put the key into the Secret keys.secretName, as cluster-key
security.tls_ca: use tls.secretName
security.tls_cert: use tls.secretName
security.tls_key: use tls.secretName
security.tls_check_hosts: leave it out; pods have addresses that no certificate lists
router.api_key: put it into the Secret keys.secretName, as api-key
router.api_keys_file: use keys.apiKeysFile
router.engine: use engine
router.port: use the value router.port
router.served_model_name: use model.servedName
bootstrap.port: use the value bootstrap.port
encode.port: use the value encode.port
language.port: use the value language.port
transfer.transports: use transports
vllm.transports: use transports
vllm.encode_urls: use encode.replicas
vllm.language_urls: use language.replicas
vllm.prefill_urls: leave it out; the chart has no three stages
vllm.decode_urls: leave it out; the chart has no three stages
{{- end }}

{{- define "embferry.ownedConnectorSettings" -}}
transports: use transports
host: use host
advertise: leave it out; each pod has its own address
router: leave it out; it is the router's Service
metrics_port: use vllm.metricsPort
cache: use settings.cache
traces_endpoint: use settings.traces.endpoint
cluster_key: put it into the Secret keys.secretName, as cluster-key
cluster_key_file: put the key into the Secret keys.secretName, as cluster-key
{{- end }}

{{- define "embferry.ownedArguments" -}}
--model: use model.name
--served-model-name: use model.servedName
--host: use host
--port: use encode.port and language.port
--api-key: put it into the Secret keys.secretName, as api-key
--hf-token: put it into a Secret, and use model.hubSecret
--ec-transfer-config: use transports and vllm.connector
{{- end }}

{{- define "embferry.wrong.owned" -}}
{{- $wrong := list -}}
{{- $variables := dict -}}
{{- range $path, $instead := include "embferry.ownedSettings" . | fromYaml -}}
{{- $_ := set $variables (printf "EMBFERRY_%s" (trimPrefix "security." $path | replace "." "_" | upper)) $instead -}}
{{- $inner := $.Values.settings -}}
{{- $there := true -}}
{{- range $key := splitList "." $path -}}
{{- if and $there (kindIs "map" $inner) (hasKey $inner $key) }}{{ $inner = index $inner $key }}{{ else }}{{ $there = false }}{{ end -}}
{{- end -}}
{{- if $there }}{{ $wrong = append $wrong (printf "settings.%s: %s" $path $instead) }}{{ end -}}
{{- end -}}
{{- range $part := list "router" "bootstrap" "encode" "language" -}}
{{- $own := list -}}
{{- range include "embferry.ownEnv" (dict "root" $ "part" $part "engine" (ternary $.Values.engine "embferry" (has $part (list "encode" "language")))) | fromYamlArray }}{{ $own = append $own .name }}{{ end -}}
{{- $seen := list -}}
{{- range $entry := (index $.Values $part).env -}}
{{- if hasKey $variables $entry.name -}}
{{- $wrong = append $wrong (printf "%s.env: %s: %s" $part $entry.name (get $variables $entry.name)) -}}
{{- else if has $entry.name $own -}}
{{- $wrong = append $wrong (printf "%s.env: %s: leave it out; the chart sets it" $part $entry.name) -}}
{{- else if has $entry.name $seen -}}
{{- $wrong = append $wrong (printf "%s.env: %s: leave one out; it is there twice" $part $entry.name) -}}
{{- else if and (eq $entry.name "HF_TOKEN") $entry.value -}}
{{- $wrong = append $wrong (printf "%s.env: HF_TOKEN: put it into a Secret, and use model.hubSecret" $part) -}}
{{- end -}}
{{- $seen = append $seen $entry.name -}}
{{- end -}}
{{- end -}}
{{- range $key, $instead := include "embferry.ownedConnectorSettings" . | fromYaml -}}
{{- if hasKey ($.Values.vllm.connector | default dict) $key }}{{ $wrong = append $wrong (printf "vllm.connector.%s: %s" $key $instead) }}{{ end -}}
{{- end -}}
{{- $arguments := include "embferry.ownedArguments" . | fromYaml -}}
{{- range $list := list "extraArgs" "encodeArgs" "languageArgs" -}}
{{- range $word := index $.Values.vllm $list -}}
{{- $option := regexFind "^--[A-Za-z_-]+" $word | replace "_" "-" -}}
{{- with index $arguments $option }}{{ $wrong = append $wrong (printf "vllm.%s: %s: %s" $list $option .) }}{{ end -}}
{{- end -}}
{{- end -}}
{{ toJson $wrong }}
{{- end }}
