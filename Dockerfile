# pronk in a container: non-root, read-only root file system, one port.
#
#   docker build -t pronk .                                        # torch as PyPI gives it (CUDA)
#   docker build -t pronk:cpu --build-arg TORCH_INDEX_URL=URL .    # URL: PyTorch's CPU wheel index
#   docker run -p 8000:8000 --read-only --tmpfs /tmp pronk:cpu     # serves the bundled model
#   docker run ... -v /my/model:/model:ro pronk:cpu serve /model   # serves yours
#
# Weights are not baked in, but for the small bundled model.

ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
ARG TORCH_INDEX_URL=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
# for the optional kernels; the compiler stays in this stage
RUN command -v gcc >/dev/null \
    || (apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev)
RUN python3 -m venv /opt/pronk
# torch first: the largest layer, and the one that changes least
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/pronk/bin/pip install -c constraints.txt ${TORCH_INDEX_URL:+--index-url ${TORCH_INDEX_URL}} torch
COPY pyproject.toml setup.py README.md LICENSE ./
COPY model ./model
COPY service ./service
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/pronk/bin/pip install -c constraints.txt . \
    && /opt/pronk/bin/pip uninstall --yes pip setuptools

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="pronk" \
      org.opencontainers.image.description="Serves a Llama-family model over HTTP" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
COPY --from=build /opt/pronk /opt/pronk
# kept between starts where a volume is mounted here; can be filled at build on a machine with a GPU
RUN install -d -o 10001 -g 10001 /opt/pronk/compiled
ENV PATH=/opt/pronk/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/tmp/huggingface \
    PRONK_COMPILE_CACHE=/opt/pronk/compiled \
    PRONK_HOST=0.0.0.0 \
    PRONK_PORT=8000 \
    PRONK_LOG_FORMAT=json
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# The process, not the model: /readyz is for load balancers, a restart cures no slow load.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"PRONK_PORT\"]}/livez', timeout=2)"]
ENTRYPOINT ["pronk"]
CMD ["serve"]
