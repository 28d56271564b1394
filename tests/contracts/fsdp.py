"""Training a small QuantLinear stack with FSDP2 on two gloo ranks, or plainly; started by test_fsdp.py."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from bitsmith.files import save_tensors
from bitsmith.quantization import Scheme, calibrate, parameter_groups, prepare, set_bits
from tests.quantization.widths import Sampled

STEPS = 4
GENERATOR = torch.Generator().manual_seed(1)
X, Y = torch.randn(STEPS, 8, 12, generator=GENERATOR), torch.randn(STEPS, 8, 3, generator=GENERATOR)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    inner = [module for _ in range(2) for module in (nn.Linear(16, 16), nn.GELU())]
    net = nn.Sequential(nn.Linear(12, 16), nn.GELU(), *inner, nn.Linear(16, 3))
    prepare(
        net,
        Scheme(bits=4, granularity="channel"),
        Scheme(bits=4, range="lsq+"),
        overrides={
            "2.weight": {"bits": 2, "granularity": "group", "group_size": 5},
            "4.weight": {"granularity": "tensor"},
        },
        first_last_bits=None,
    )
    set_bits(net, {"4.weight": Sampled([2, 4]), "4.input": Sampled([2, 4])})
    calibrate(net, [X.flatten(0, 1)])
    return net


def fit(net: nn.Module, rank: int, ranks: int) -> list[float]:
    """Four steps of SGD, each rank on its share of the batch; the losses of the whole batch."""
    optimizer = torch.optim.SGD(parameter_groups(net, learning_rate=0.1), momentum=0.9)
    losses = []
    for x, y in zip(X, Y, strict=True):
        loss = (net(x.chunk(ranks)[rank]) - y.chunk(ranks)[rank]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if ranks > 1:
            dist.all_reduce(total)
        losses.append(float(total) / ranks)
    return losses


def main(rank: int, ranks: int, folder: str) -> None:
    """One rank; rank 0 writes the whole trained state to ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    mesh = dist.init_device_mesh("cpu", (ranks,))
    net = model()
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    losses = fit(net, rank, ranks)
    state = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in net.state_dict().items()
    }
    if rank == 0:
        save_tensors(Path(folder) / "state", {**state, "losses": torch.tensor(losses, dtype=torch.float64)})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
