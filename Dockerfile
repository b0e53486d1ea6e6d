# ComfyUI with this pack, for trainings and batches without a screen. Everything comes from package registries: the
# distribution's packages by apt, all else by pip, as configured where the image is built.
#
#   docker build -t tlora .                                       for the CPU
#   docker build -t tlora-cuda --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 .      for NVIDIA cards
#   docker run --rm tlora demo
#   docker run --rm --gpus all -v "$PWD:/work" -v "$PWD/models:/cache/workspace/models" tlora-cuda batch jobs.csv
#
# The base is a Debian or Ubuntu with Python 3.10 or newer in its packages.
ARG BASE=debian:trixie-slim
# hadolint ignore=DL3006
FROM ${BASE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV TLORA_HOST_CACHE=/cache \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

# What the set-up is built from comes first, so that a change of the code alone does not repeat it.
WORKDIR /opt/tlora
COPY requirements.txt ./
COPY tools ./tools
RUN python3 tools/host.py setup

COPY pyproject.toml __init__.py LICENSE ./
COPY tlora_core ./tlora_core
COPY nodes ./nodes
COPY web ./web
COPY locales ./locales
COPY workflows ./workflows

# Tables and results are in the folder that is mounted here.
WORKDIR /work
ENTRYPOINT ["python3", "/opt/tlora/tools/host.py"]
CMD ["demo"]
