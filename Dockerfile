# syntax=docker/dockerfile:1
#
# For hosts with an NVIDIA GPU, a driver for CUDA 13 (580 or newer) and the NVIDIA Container Toolkit.
#
#   build:  docker build -t dreamer .
#   train:  mkdir -p logdir
#           docker run --rm -it --gpus all --shm-size 2g --user "$(id -u):$(id -g)" -v "$PWD/logdir:/dreamer/logdir" \
#             dreamer --configs dmc_vision --task dmc_walker_walk
#   help:   docker run --rm dreamer --help
#   tests:  docker run --rm --gpus all --shm-size 2g --entrypoint python dreamer -m pytest -m "not slow" -q -rs
#   curves: docker run --rm -p 127.0.0.1:6006:6006 -v "$PWD/logdir:/dreamer/logdir" --entrypoint tensorboard \
#             dreamer --logdir logdir --bind_all
#
# `--shm-size` is for the frames of the environment processes; `--user` makes the files in logdir yours.

FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04

# EGL renders MuJoCo without a screen; a C compiler and Python's headers are what torch.compile needs.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    gcc libc6-dev libegl1 libgl1 python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

# `graphics` hands the driver's EGL to the container; older toolkits leave out the file that says where it is.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics
RUN mkdir -p /usr/share/glvnd/egl_vendor.d \
 && echo '{"file_format_version": "1.0.0", "ICD": {"library_path": "libEGL_nvidia.so.0"}}' \
    > /usr/share/glvnd/egl_vendor.d/10_nvidia.json

# The packages change rarely, so they have a layer before the code. On Linux the plain torch package is the CUDA build.
WORKDIR /dreamer
COPY requirements.txt constraints.txt ./
COPY requirements/ requirements/
RUN python3 -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir -c constraints.txt -r requirements.txt -r requirements/test.txt
ENV PATH=/opt/venv/bin:$PATH

COPY . .

# Any user id may run the image: the home folder and the caches are in /tmp, and a user without an entry has a name.
RUN mkdir -p logdir && chmod 777 logdir
ENV HOME=/tmp \
    USER=dreamer \
    MUJOCO_GL=egl \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 1000:1000

ENTRYPOINT ["python", "dreamer.py"]
CMD ["--configs", "dmc_vision"]
