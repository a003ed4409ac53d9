# docker build -t effnet_train .     then: docker run --gpus all --ipc=host -v /data:/data -v $PWD/runs:/work/runs effnet_train \
#     effnet-train model=b4 data=imagenet data.root=/data
# PyTorch's wheel brings CUDA and NCCL along; the host needs NVIDIA's driver and container toolkit only.
FROM python:3.11-slim
COPY pyproject.toml README.md LICENSE /src/
COPY effnet_train /src/effnet_train
COPY configs /src/configs
RUN pip install --no-cache-dir "/src[digits,plots,remote,parquet]"
WORKDIR /work
CMD ["effnet-train", "--help"]
