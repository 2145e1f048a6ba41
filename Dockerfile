# docker build -t halos .
# docker run --gpus all --shm-size 8g -v /data:/data halos loss=kto model=llama7b cache_dir=/data/models
#
# The package index has torch for Linux with CUDA's libraries, so a host needs the NVIDIA driver and container toolkit
# alone. For another CUDA: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# A C compiler, for model.compile alone. Any version does.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# Not root: what a run writes to a mounted folder belongs to user 1000.
RUN useradd --create-home --uid 1000 halos && install --directory --owner halos /opt/halos
WORKDIR /opt/halos

# The versions that are tested, in a layer of its own, torch first, as the Makefile does.
COPY requirements.lock ./
ARG TORCH_INDEX=https://pypi.org/simple
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" "$(grep '^torch==' requirements.lock)" \
    && pip install --no-cache-dir -r requirements.lock

COPY --chown=halos . ./
USER 1000
ENTRYPOINT ["python", "train.py"]
CMD ["--help"]
