# The image of every task: kubegraft with TensorFlow and KFP, for CPUs (--target cpu) or NVIDIA GPUs (--target gpu).
# `make images` builds it; docker/README.md says why it is as it is. Plain instructions only, so that builders
# without BuildKit do: no heredocs, no RUN --mount.
#
# checkov:skip=CKV_DOCKER_7: the base image's tag stands in the ARG below, where checkov does not look
# checkov:skip=CKV_DOCKER_2: a task runs to its end and is no server; Kubernetes ignores HEALTHCHECK in any case
ARG PYTHON_IMAGE=python:3.13-slim-trixie

# ---- build tools; nothing of this stage is in an image --------------------------------------------------
FROM ${PYTHON_IMAGE} AS build
# The time that every file gets; with it, equal inputs make equal files.
ARG SOURCE_DATE_EPOCH=1767225600
# A fixed hash seed: the order of constant sets is written into bytecode.
ENV SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH} PYTHONHASHSEED=0 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
COPY docker/requirements-build.txt /build/
RUN python3 -m venv /opt/build \
 && /opt/build/bin/python -m pip install --no-compile --require-hashes --only-binary=:all: -r /build/requirements-build.txt \
 && python3 -m venv --without-pip /opt/kubegraft
COPY docker/slim.py docker/strip_symbols.py docker/sbom.py /build/

# ---- CPU --------------------------------------------------------------------------------------------------
FROM build AS packages-cpu
COPY docker/requirements-cpu.txt /build/requirements.txt
# `pip wheel` checks every hash, and builds what is published as source only, with the tools above.
RUN /opt/build/bin/python -m pip wheel --require-hashes --no-deps --no-build-isolation -w /wheels -r /build/requirements.txt \
 && /opt/build/bin/python -m pip --python /opt/kubegraft/bin/python install --no-index --no-deps --no-compile /wheels/*.whl \
 && /opt/build/bin/python -m pip --python /opt/kubegraft/bin/python check \
 && /opt/build/bin/python /build/slim.py packages /opt/kubegraft \
 && rm -r /wheels

FROM packages-cpu AS code-cpu
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY pipelines/compiled pipelines/compiled
COPY benchmarks benchmarks
COPY src src
RUN /opt/build/bin/python -m pip wheel --no-index --no-deps --no-build-isolation -w /wheels . \
 && /opt/build/bin/python -m pip --python /opt/kubegraft/bin/python install --no-index --no-deps --no-compile /wheels/*.whl \
 && mkdir /code && /opt/kubegraft/bin/python /build/sbom.py > /code/sbom.cdx.json \
 && /opt/build/bin/python /build/slim.py code /opt/kubegraft /code

FROM ${PYTHON_IMAGE} AS cpu
LABEL org.opencontainers.image.title="kubegraft-train" \
      org.opencontainers.image.description="Transfer learning on images: all tasks of kubegraft, on CPUs" \
      org.opencontainers.image.source="https://github.com/kubegraft/kubegraft" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.vendor="The kubegraft authors"
# Whatever writes below the home directory does so in /tmp: the root file system may be read-only, and KFP's HOME is /.
# A pod whose /tmp outgrows its limit is evicted, so the feature cache there is kept small. Large pages for what is
# computed with: the frozen pass is 1.1 to 1.25 times as fast.
ENV PATH=/opt/kubegraft/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp KERAS_HOME=/tmp/keras MPLCONFIGDIR=/tmp/matplotlib XDG_CACHE_HOME=/tmp/cache XDG_CONFIG_HOME=/tmp/config \
    KUBEGRAFT_CACHE_BUDGET=2GiB GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONNOUSERSITE=1
# By what changes least: a change of the code moves the second layer only.
COPY --from=packages-cpu /opt/kubegraft /opt/kubegraft
COPY --from=code-cpu /code /opt/kubegraft
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["kubegraft"]
CMD ["--help"]
ARG IMAGE_VERSION=0
LABEL org.opencontainers.image.version="${IMAGE_VERSION}"

# ---- GPU: the same, with TensorFlow's CUDA build -------------------------------------------------------------
FROM build AS packages-gpu
COPY docker/requirements-gpu.txt /build/requirements.txt
RUN /opt/build/bin/python -m pip wheel --require-hashes --no-deps --no-build-isolation -w /wheels -r /build/requirements.txt \
 && /opt/build/bin/python -m pip --python /opt/kubegraft/bin/python install --no-index --no-deps --no-compile /wheels/*.whl \
 && /opt/build/bin/python -m pip --python /opt/kubegraft/bin/python check \
 && /opt/build/bin/python /build/slim.py packages /opt/kubegraft \
 && rm -r /wheels

FROM packages-gpu AS code-gpu
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY pipelines/compiled pipelines/compiled
COPY src src
RUN /opt/build/bin/python -m pip wheel --no-index --no-deps --no-build-isolation -w /wheels . \
 && /opt/build/bin/python -m pip --python /opt/kubegraft/bin/python install --no-index --no-deps --no-compile /wheels/*.whl \
 && mkdir /code && /opt/kubegraft/bin/python /build/sbom.py > /code/sbom.cdx.json \
 && /opt/build/bin/python /build/slim.py code /opt/kubegraft /code

FROM ${PYTHON_IMAGE} AS gpu
LABEL org.opencontainers.image.title="kubegraft-train-gpu" \
      org.opencontainers.image.description="Transfer learning on images: all tasks of kubegraft, on NVIDIA GPUs" \
      org.opencontainers.image.source="https://github.com/kubegraft/kubegraft" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.vendor="The kubegraft authors"
ENV PATH=/opt/kubegraft/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp KERAS_HOME=/tmp/keras MPLCONFIGDIR=/tmp/matplotlib XDG_CACHE_HOME=/tmp/cache XDG_CONFIG_HOME=/tmp/config \
    KUBEGRAFT_CACHE_BUDGET=2GiB GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONNOUSERSITE=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=packages-gpu /opt/kubegraft /opt/kubegraft
COPY --from=code-gpu /code /opt/kubegraft
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["kubegraft"]
CMD ["--help"]
ARG IMAGE_VERSION=0
LABEL org.opencontainers.image.version="${IMAGE_VERSION}"
