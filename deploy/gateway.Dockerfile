# The image of the gateway. It has no model, no torch and no GPU code.
#
# Build it in the root of the repository. gateway.Dockerfile.dockerignore keeps the context small:
#   docker build -f deploy/gateway.Dockerfile -t llama-gateway .

FROM python:3.12-slim-trixie AS requirements
RUN python -m venv /venv
COPY requirements-gateway.txt /
# Wheels only, so that no compiler is needed.
RUN /venv/bin/pip install --no-cache-dir --only-binary :all: -r /requirements-gateway.txt

FROM python:3.12-slim-trixie
LABEL org.opencontainers.image.title="llama-gateway" \
      org.opencontainers.image.description="A page and Replicate's and OpenAI's APIs in front of Llama 2 70B Chat" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=requirements /venv /venv
WORKDIR /app
COPY LICENSE NOTICE ./
COPY llama/__init__.py llama/__main__.py llama/errors.py llama/settings.py llama/
COPY llama/cli llama/cli
COPY llama/gateway llama/gateway
COPY llama/serving llama/serving
COPY llama/weights llama/weights
# A new volume at /data gets the owner of this folder. Python files are compiled here, because the container's
# file system can be read-only.
RUN python -m compileall -q llama && install --directory --owner 10001 --group 10001 --mode 700 /data
# A numeric user, because Kubernetes cannot tell whether a named one is root.
USER 10001:10001
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/data \
    LLAMA_GATEWAY_DATABASE=/data/gateway.sqlite3 \
    LLAMA_GATEWAY_LOG_FORMAT=json
EXPOSE 8000
# http.client, because urllib would send the request to a proxy that the environment names.
HEALTHCHECK --interval=15s --timeout=5s --start-period=15s \
    CMD ["python", "-c", "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/healthz'); sys.exit(c.getresponse().status != 200)"]
# No shell, so that SIGTERM reaches the gateway.
ENTRYPOINT ["python", "-m", "llama"]
CMD ["gateway", "--help"]
