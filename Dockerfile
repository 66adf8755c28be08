# Two images from one file, both without build tools and without root:
#   docker build -t embferry .                          router, bootstrap server and our own engine, on CPUs
#   docker build --target vllm -t embferry-vllm .       vLLM's own image with the connector, for GPUs
# docs/kubernetes.md says how to run them.
ARG PYTHON_IMAGE=python:3.12-slim-bookworm
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE CHANGELOG.md ./
COPY src ./src
RUN python -m venv /builder \
 && /builder/bin/pip install --no-cache-dir --constraint constraints.txt build hatchling \
 && /builder/bin/python -m build --no-isolation --wheel --outdir /wheel

FROM ${PYTHON_IMAGE} AS environment
# Extras of pyproject.toml. Torch comes from an index of builds for CPUs; empty: from pip's own index.
ARG EXTRAS=serve,traces
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt /constraints.txt
COPY --from=wheel /wheel /wheel
RUN python -m venv --without-pip /embferry \
 && python -m pip --python /embferry/bin/python install --no-cache-dir --constraint /constraints.txt \
      --no-deps ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} torch \
 && for wheel in /wheel/*.whl; do \
      python -m pip --python /embferry/bin/python install --no-cache-dir --constraint /constraints.txt \
        "${wheel}[${EXTRAS}]"; \
    done

FROM ${VLLM_IMAGE} AS vllm
COPY --from=wheel /wheel /wheel
# All that vLLM brings stays: the versions of constraints.txt are not for this environment.
# hadolint ignore=DL3013
RUN for wheel in /wheel/*.whl; do python3 -m pip install --no-cache-dir "${wheel}[router]"; done \
 && install -d -o 10001 -g 10001 /cache /home/embferry
ENV HOME=/home/embferry USER=embferry HF_HOME=/cache/huggingface
USER 10001:10001
ENTRYPOINT ["vllm"]
CMD ["serve", "--help"]

FROM ${PYTHON_IMAGE} AS embferry
RUN python -m pip uninstall --yes pip \
 && install -d -o 10001 -g 10001 /cache /home/embferry
COPY --from=environment /embferry /embferry
# The router listens on every address; the other parts of `embferry serve` stay on the loopback address.
ENV PATH=/embferry/bin:$PATH HOME=/home/embferry USER=embferry HF_HOME=/cache/huggingface \
    EMBFERRY_HOST=0.0.0.0
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s CMD ["embferry", "probe", "127.0.0.1:8000"]
ENTRYPOINT ["embferry"]
CMD ["serve"]
