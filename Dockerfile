# The classroom and the grader in one image:
#
#   docker build --tag qlora-lab .                   # --build-arg PIP_FLAGS=... as for make; or: make container
#   docker run --rm -p 127.0.0.1:8888:8888 -v my-course:/course qlora-lab
#   qlora-lab grade --container qlora-lab --class handed_in --results grades
#
# All that is installed is in .devcontainer/setup.sh, which runs on a bare Debian without Docker as well.
FROM debian:bookworm-slim
ARG PIP_FLAGS=
COPY . /tmp/checkout
RUN PIP_FLAGS="$PIP_FLAGS" /tmp/checkout/.devcontainer/setup.sh /tmp/checkout && rm -rf /tmp/checkout
ENV PATH=/opt/qlora-lab/bin:$PATH \
    QLORA_LAB_CACHE=/opt/qlora-lab/models \
    QLORA_LAB_PROGRESS=/course/progress.json \
    HF_HUB_OFFLINE=1 \
    GOMP_SPINCOUNT=1000
USER learner
WORKDIR /course
EXPOSE 8888
CMD ["qlora-lab", "course", "/course", "--", "--no-browser", "--ip=0.0.0.0"]
