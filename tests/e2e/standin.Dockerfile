# Plays the pods of a TransferJob in a second each, for tests of the operator where training is not the point.
ARG PYTHON_IMAGE=python:3.13-slim-trixie
FROM ${PYTHON_IMAGE}
COPY standin_job.py /standin/standin_job.py
# A look at the data is started as `python -m kubegraft.look`.
RUN mkdir /standin/kubegraft && touch /standin/kubegraft/__init__.py \
 && echo 'import standin_job, sys; standin_job.main("look", sys.argv)' > /standin/kubegraft/look.py
ENV PYTHONPATH=/standin PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["python3", "/standin/standin_job.py"]
