# The image of the operator: kubegraft without TensorFlow and KFP (`make images TARGETS=operator`). A file of its own, since builders
# without BuildKit build every stage of a file. docker/README.md says why it is as it is.
#
# checkov:skip=CKV_DOCKER_7: the base image's tag stands in the ARG below, where checkov does not look
# checkov:skip=CKV_DOCKER_2: Kubernetes ignores HEALTHCHECK; the Deployment has probes
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

# ---- the operator -----------------------------------------------------------------------------------------
FROM build AS packages-operator
COPY docker/requirements-operator.txt /build/requirements.txt
RUN /opt/build/bin/python -m pip wheel --require-hashes --no-deps --no-build-isolation -w /wheels -r /build/requirements.txt \
 && /opt/build/bin/python -m pip --python /opt/kubegraft/bin/python install --no-index --no-deps --no-compile /wheels/*.whl \
 && /opt/build/bin/python -m pip --python /opt/kubegraft/bin/python check \
 && /opt/build/bin/python /build/slim.py packages /opt/kubegraft \
 && rm -r /wheels

FROM packages-operator AS code-operator
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY pipelines/compiled pipelines/compiled
COPY benchmarks benchmarks
COPY src src
RUN /opt/build/bin/python -m pip wheel --no-index --no-deps --no-build-isolation -w /wheels . \
 && /opt/build/bin/python -m pip --python /opt/kubegraft/bin/python install --no-index --no-deps --no-compile /wheels/*.whl \
 && mkdir /code && /opt/kubegraft/bin/python /build/sbom.py > /code/sbom.cdx.json \
 && /opt/build/bin/python /build/slim.py code /opt/kubegraft /code

FROM ${PYTHON_IMAGE} AS operator
LABEL org.opencontainers.image.title="kubegraft-operator" \
      org.opencontainers.image.description="Turns TransferJobs into distributed training" \
      org.opencontainers.image.source="https://github.com/kubegraft/kubegraft" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.vendor="The kubegraft authors"
ENV PATH=/opt/kubegraft/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp XDG_CACHE_HOME=/tmp/cache XDG_CONFIG_HOME=/tmp/config \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONNOUSERSITE=1
COPY --from=packages-operator /opt/kubegraft /opt/kubegraft
COPY --from=code-operator /code /opt/kubegraft
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["kubegraft"]
CMD ["operator", "run"]
ARG IMAGE_VERSION=0
LABEL org.opencontainers.image.version="${IMAGE_VERSION}"
