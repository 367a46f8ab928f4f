"""Models over two processes (gloo): split by transformers' tensor and expert parallelism; batches by DDP and FSDP2."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import randomize, transformers_config, transformers_gemma4

transformers = pytest.importorskip("transformers", minversion="5.17")
transformers_gemma4()
pytest.importorskip("transformers.distributed.tensor_parallel")

SCRIPT = Path(__file__).with_name("parallel_model.py")


def gemma4():
    config = transformers_config(
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        num_experts=8,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.Gemma4ForCausalLM(config)


def gpt_oss():
    """Each rank has the biases of its experts."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**sizes, **heads, num_local_experts=8, num_experts_per_tok=2)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (gemma4, "tensor"),
        (gemma4, "expert"),
        (gpt_oss, "expert"),
        (gemma4, "ddp"),
        (gemma4, "fsdp2"),
        (gpt_oss, "fsdp2"),
    ],
)
def test_two_processes_compute_as_one(build, kind, tmp_path):
    model = randomize(build())
    model.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    hidden = {"CUDA_VISIBLE_DEVICES": ""}  # gloo, where transformers would take NCCL
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(SCRIPT), str(tmp_path), kind, type(model).__name__],
            env=os.environ | place | hidden | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, output in enumerate(outputs):
        assert f"rank {rank} agrees" in output, output
