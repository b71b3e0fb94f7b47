# The image that trains and evaluates: CUDA and torch are the base's, all else is requirements.lock's, by hash.
#
#   make image                                        # docker, podman or buildah, whichever works here
#   docker run --rm --init --gpus all --ipc host IMAGE \
#     tune run --nproc_per_node 4 recipes/full_finetune_distributed_wmtp.py --config configs/tiny/uniform.yaml
#
# CUDA 12.6 runs on every driver from 525 on. A base of your own needs `python` with pip and the pinned torch; one that has
# another torch is refused. Behind a mirror: `--secret id=pip,src=pip.conf` is read by pip and goes into no layer.
ARG BASE=pytorch/pytorch:2.13.0-cuda12.6-cudnn9-runtime

# ---- Which requirements: a change of pyproject.toml that changes no requirement ends here, before the long layer.
FROM ${BASE} AS selection
WORKDIR /selection
COPY docker/locked.py pyproject.toml requirements.lock ./
RUN python locked.py base . && python locked.py select . > selected.txt

# ---- The environment: it sees the base's packages and lies over them. --no-deps: nothing that is not in the lock.
FROM ${BASE} AS dependencies
COPY --from=selection /selection/selected.txt /selection/selected.txt
RUN --mount=type=cache,target=/var/cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -m venv --system-site-packages --without-pip /opt/wmtp \
    && python -m pip --python /opt/wmtp/bin/python install --cache-dir /var/cache/pip --no-deps --require-hashes --requirement /selection/selected.txt

# ---- The library, as a wheel; what builds it stays here.
FROM ${BASE} AS package
WORKDIR /package
COPY docker/build-requirements.lock ./
RUN --mount=type=cache,target=/var/cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -m venv --without-pip /opt/build \
    && python -m pip --python /opt/build/bin/python install --cache-dir /var/cache/pip --no-deps --require-hashes --requirement build-requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY wmtp wmtp
RUN python -m pip --python /opt/build/bin/python wheel --no-deps --no-build-isolation --no-index --wheel-dir /wheels .

# ---- What runs.
FROM ${BASE}
# Not 1000: bases have a user of that number. A mounted folder must be writable by it.
ARG UID=10001
RUN useradd --uid "${UID}" --create-home --shell /bin/bash wmtp && install --directory --owner wmtp --group wmtp /workspace
COPY --from=dependencies /opt/wmtp /opt/wmtp
# The build ends here if pip replaced torch, or if a package is not the locked one.
RUN --mount=type=bind,from=package,source=/wheels,target=/wheels \
    --mount=type=bind,from=selection,source=/selection,target=/selection \
    python -m pip --python /opt/wmtp/bin/python install --no-cache-dir --no-deps --no-index /wheels/*.whl \
    && /opt/wmtp/bin/python /selection/locked.py verify /selection
ENV PATH=/opt/wmtp/bin:$PATH \
    PYTHONPATH=/workspace \
    PYTHONUNBUFFERED=1
# Recipes are there to be edited: they belong to the user, beside the folder for their results.
WORKDIR /workspace
COPY --chown=wmtp:wmtp recipes recipes
COPY --chown=wmtp:wmtp configs configs
USER ${UID}
RUN tune run --help > /dev/null && python -c "import wmtp.sandbox, wmtp.loss, wmtp.models, wmtp.data"
# The image has no .git: runs are tagged with the commit that it was made from.
ARG GIT_COMMIT=unknown
ENV WMTP_GIT_COMMIT=${GIT_COMMIT}
LABEL org.opencontainers.image.title="wmtp" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${GIT_COMMIT}"
# A run ends by itself; nothing answers a probe.
HEALTHCHECK NONE
CMD ["tune", "run", "--help"]
