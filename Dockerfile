# docker build -t headrace .
# docker run --rm -p 127.0.0.1:8000:8000 -e HEADRACE_INSECURE_NO_AUTH=1 -v headrace-models:/models -v headrace-data:/data headrace
# docker run --rm -p 8000:8000 -e HEADRACE_API_KEYS=a-long-secret -v headrace-models:/models -v headrace-data:/data headrace
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# The server has no need of root. The folder is made here, so that a new volume belongs to the user.
RUN useradd --create-home --uid 10001 headrace && \
    install -d -o headrace -g headrace /models && \
    install -d -m 0700 -o headrace -g headrace /data

WORKDIR /app
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY src ./src
RUN pip install -c constraints.txt .

USER headrace

# Models are fetched and converted into this folder at the first start, and found there at the next.
ENV HEADRACE_CACHE=/models
VOLUME /models

# Keys, the ledger and kept answers.
ENV HEADRACE_DATA_DIR=/data
VOLUME /data

# A container's port can only be published from an address beyond loopback, and there the server refuses to start without keys:
# give it HEADRACE_API_KEYS, or HEADRACE_INSECURE_NO_AUTH=1 where the port is published to this machine alone, as compose.yaml does.
ENV HEADRACE_HOST=0.0.0.0
EXPOSE 8000

# http.client knows no proxies, which containers often have in their environment. The first start downloads the model.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; e = os.environ.get; c = http.client.HTTPConnection('127.0.0.1', int(e('HEADRACE_PORT') or e('HEADRACE_API_PORT') or e('API_PORT') or 8000), timeout=4); c.request('GET', '/health'); sys.exit(c.getresponse().status != 200)"]

# As process 1 the supervisor handles SIGTERM, drains, and waits for its children; it needs no init beside it.
# A model and flags may follow: docker run … headrace qwen3-0.6b --context 4096
STOPSIGNAL SIGTERM
ENTRYPOINT ["headrace", "serve"]
