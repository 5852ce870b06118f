# One image for every role: `kleash serve`, `kleash ppo`, `kleash demo`, ... (k8s/image/README.md).
#
#   docker build --build-arg TORCH_INDEX=URL .              CPU; URL: PyTorch's index of CPU wheels
#   docker build --build-arg VARIANT=cuda .                 GPU
#   docker build --target vllm .                            see the comment at that stage
#
# Needs BuildKit or buildah. Each stage after `python` installs into /opt/kleash and leaves what it
# added in /layer: OS, torch, dependencies and project are separate layers of the image, and a
# change of the sources rebuilds, pushes and pulls the last one alone, less than 5 MB.

# A Debian or Ubuntu with Python 3.11 or newer and its venv module; a digest may follow the tag.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# ---- The builder: pip in an environment of its own, and the empty one that the image gets.
FROM ${BASE_IMAGE} AS python
ARG PIP_VERSION=26.3
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/pip \
    && /opt/pip/bin/pip install "pip==${PIP_VERSION}" \
    && python3 -m venv --without-pip /opt/kleash \
    && mkdir --parents /layer/opt && cp --archive /opt/kleash /layer/opt/
COPY k8s/image/install.sh k8s/image/requirements.py /build/
WORKDIR /build

# ---- torch alone, with the CUDA libraries that it pins; nothing here depends on constraints.txt.
FROM python AS torch
ARG VARIANT=cpu
ARG TORCH_VERSION=2.13.0
# An index besides pip's own; PyTorch offers its CPU builds on an index of their own.
ARG TORCH_INDEX=
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    case "${VARIANT}" in \
        cpu) torch="torch==${TORCH_VERSION}+cpu" ;; \
        cuda) torch="torch==${TORCH_VERSION},!=${TORCH_VERSION}+cpu" ;; \
        *) echo "error: VARIANT is '${VARIANT}'; it is cpu or cuda."; exit 2 ;; \
    esac \
    && { sh install.sh ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} --no-deps "${torch}" \
        || { echo "error: ${torch} was not installed; TORCH_INDEX names an index that has it."; exit 1; }; } \
    && /opt/kleash/bin/python requirements.py torch >torch.txt \
    && sh install.sh --requirement torch.txt

# ---- The other dependencies. Only the list of them reaches the next stage, so that no other change
# of pyproject.toml installs them anew.
FROM python AS requirements
ARG EXTRAS=train,k8s,trace
COPY pyproject.toml ./
RUN python3 requirements.py project "${EXTRAS}" >project.txt

FROM torch AS dependencies
COPY --from=requirements /build/project.txt ./
COPY constraints.txt ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    rm -rf /layer \
    && sh install.sh --constraint constraints.txt --requirement project.txt

# ---- The project itself.
FROM python AS project
COPY constraints.txt ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    rm -rf /layer \
    && /opt/pip/bin/pip install --constraint constraints.txt hatchling
COPY . .
RUN /opt/pip/bin/pip wheel --no-deps --no-index --no-build-isolation --wheel-dir wheels . \
    && sh install.sh --no-deps --no-index wheels/kleash-*.whl

# ---- The operating system of the image: no pip, an account, and the places that may be written.
FROM ${BASE_IMAGE} AS system
RUN find / -xdev -depth -regextype posix-extended -regex \
        '.*/(python3[^/]*/ensurepip|python-wheels|bin/pip[0-9.]*|(site|dist)-packages/(pip|setuptools|wheel|pkg_resources|_distutils_hack|distutils-precedence)[^/]*)' \
        -exec rm -rf {} + \
    && useradd --no-log-init --uid 10001 --gid 0 --home-dir /cache --no-create-home \
        --shell /usr/sbin/nologin kleash \
    && install --directory --owner=10001 --group=0 --mode=775 /cache /models /runs
# An arbitrary UID has no name and no home: both come from here, and group 0 may write below /cache.
ENV PATH=/opt/kleash/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    USER=kleash \
    HOME=/cache \
    XDG_CACHE_HOME=/cache/xdg \
    HF_HOME=/cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    TRITON_CACHE_DIR=/cache/triton \
    MPLCONFIGDIR=/cache/matplotlib
WORKDIR /
USER 10001:0
STOPSIGNAL SIGTERM
# PID 1 is kleash itself: SIGTERM reaches it, and it drains.
ENTRYPOINT ["kleash"]
CMD ["--help"]

# ---- All but the project: what a change of the sources leaves alone.
FROM system AS runtime
COPY --from=torch /layer /
COPY --from=dependencies /layer /

# ---- An environment for vLLM, `--target vllm`: vLLM pins torch and transformers to versions of its
# own, CUDA builds, so that they cannot stand in the image below. It holds vLLM and Kleash's client
# and services side by side. No engine of Kleash drives vLLM yet: `kleash serve policy` in it
# generates with the same torch engine as everywhere. vLLM compiles kernels when it starts: this
# image, and no other, keeps a compiler, headers and setuptools.
FROM python AS vllm-environment
COPY pyproject.toml ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    python3 requirements.py project vllm,k8s >project.txt \
    && KLEASH_KEEP=1 sh install.sh --requirement project.txt

FROM system AS vllm-system
USER 0
# The version is the base image's to choose.
# hadolint ignore=DL3008
RUN include=$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))') \
    && if [ -e "${include}/Python.h" ]; then headers=; else headers=python3-dev; fi \
    && apt-get update \
    && apt-get install --yes --no-install-recommends g++ ${headers:+"${headers}"} \
    && rm -rf /var/lib/apt/lists/*
USER 10001:0

FROM vllm-system AS vllm
COPY --from=vllm-environment /layer /
COPY --from=project /layer /
LABEL org.opencontainers.image.title="kleash-vllm" \
    org.opencontainers.image.description="vLLM and Kleash in one environment; no engine of Kleash drives vLLM yet" \
    org.opencontainers.image.licenses="Apache-2.0"

# ---- The image.
FROM runtime AS kleash
COPY --from=project /layer /
ARG VERSION=0.1.0
ARG REVISION=
ARG SOURCE=
LABEL org.opencontainers.image.title="kleash" \
    org.opencontainers.image.description="RLHF as services: policy, reward, reference, trainer" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.source="${SOURCE}"
