"""Causal attention over a sequence that no process holds whole, and how far it is from fp64.

    torchrun --nproc-per-node 4 examples/ring_attention.py

On GPUs each rank takes one, and NCCL passes the keys around; else gloo does, on the CPU.
"""

import os

import torch
import torch.distributed as dist

from attn_reference import Inputs, Problem, attention, gradients
from online_softmax.placement import positions
from online_softmax.ring_distributed import ring_attention


def main() -> None:
    """One rank; what holds the group, as the graph of a backward does, is gone when it returns."""
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)

    # For the comparison every rank draws the whole; what it passes on is its share.
    torch.manual_seed(0)
    length, heads, kv_heads, dim = 1000, 4, 2, 64
    whole = {
        name: torch.randn(1, h, length, dim)
        for name, h in (("q", heads), ("k", kv_heads), ("v", kv_heads), ("grad_out", heads))
    }
    mine = positions(length, ranks, rank)  # zig-zag: a chunk from each end
    q, k, v, grad_out = (whole[name][:, :, mine].to(device) for name in whole)
    for tensor in (q, k, v):
        tensor.requires_grad_()

    out, lse = ring_attention(q, k, v, causal="bottom-right")
    out.backward(grad_out)

    problem = Problem(
        heads_q=heads,
        heads_kv=kv_heads,
        seqlen_q=length,
        head_dim=dim,
        causal="bottom-right",
        gradients=("q", "k", "v"),
    )
    inputs = Inputs(**whole)
    truth = attention(inputs, problem)
    expected = {"out": truth.out, "lse": truth.lse}
    backward = gradients(inputs, problem, result=truth).tensors()
    expected |= {f"d{name}": gradient for name, gradient in backward.items()}
    found = {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    for name, tensor in found.items():
        error = (tensor.detach().double() - expected[name][:, :, mine].to(device)).abs().max()
        dist.all_reduce(error, dist.ReduceOp.MAX)
        if rank == 0:
            print(f"{name:4} differs from the fp64 reference by at most {error.item():.1e}")


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
