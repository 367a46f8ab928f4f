"""Gemma 4 that transformers has split over two processes (gloo), by tensor and by expert parallelism."""

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

SCRIPT = Path(__file__).with_name("parallel_gemma4.py")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor", "expert"])
def test_a_split_model_computes_as_a_whole_one(kind, tmp_path):
    config = transformers_config(
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        num_experts=8,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    randomize(transformers.Gemma4ForCausalLM(config)).save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    hidden = {"CUDA_VISIBLE_DEVICES": ""}  # gloo, where transformers would take NCCL
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(SCRIPT), str(tmp_path), kind],
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
