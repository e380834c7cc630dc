# The trainer, for clusters: docs/launch.md.
#
#   docker build --tag=REGISTRY/perceiver-ar:1 .
#   docker build --build-arg=EXTRA=cuda --tag=REGISTRY/perceiver-ar:1-cuda .
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# An extra of pyproject.toml: tpu, cuda, or nothing at all for CPUs.
ARG EXTRA=tpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /app

# What it depends on, in a layer that outlives changes of the source.
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*p['dependencies'], *(p['optional-dependencies']['${EXTRA}'] if '${EXTRA}' else []), sep='\n')" \
    > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt \
    && rm requirements.txt

COPY README.md LICENSE ./
COPY perceiver_ar perceiver_ar
RUN pip install --no-deps .
# Configs are named as in a checkout: --config=configs/books.py:long.
COPY configs configs

RUN useradd --create-home --uid=1000 perceiver
USER 1000
ENTRYPOINT ["perceiver-ar"]
CMD ["--help"]
