# Plays the pods of a TransferJob in a second each, for tests of the operator where training is not the point.
ARG PYTHON_IMAGE=python:3.13-slim-trixie
FROM ${PYTHON_IMAGE}
COPY standin_job.py /standin_job.py
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["python3", "/standin_job.py"]
