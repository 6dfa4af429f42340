# The image of the team's stack: both servers, the workers and the runs, with the versions of constraints.txt.
#
#   docker build --tag cdpo .
#   docker build --tag cdpo --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .     (no CUDA: 5 GB less)
#
# The same steps as `make env`, without what only tests need.
FROM python:3.11.7-slim-bookworm
ARG TORCH_INDEX=""
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN python -m pip install --quiet --upgrade "pip>=26" \
 && if [ -n "$TORCH_INDEX" ]; then python -m pip install --quiet --constraint constraints.txt --index-url "$TORCH_INDEX" torch; fi
COPY cdpo_core cdpo_core
COPY tasks tasks
COPY flows flows
COPY deployments deployments
COPY configs configs
RUN python -m pip install --quiet --constraint constraints.txt .
RUN python -m compileall -q -j 0 /usr/local/lib/python3.11/site-packages >/dev/null 2>&1 || true
RUN python -m flows.prefect_database
# Runs need no rights; what counts is in the store, and /cdpo holds scratch, caches and logs.
RUN useradd --uid 10001 --create-home cdpo && install -d -o cdpo /cdpo && rm -rf /app/*
USER cdpo
ENV CDPO_HOME=/cdpo PREFECT_HOME=/cdpo/prefect
VOLUME /cdpo
WORKDIR /cdpo
CMD ["cdpo", "--help"]
