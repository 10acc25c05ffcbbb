"""The pretended CUDA device: CUDA's rules of place, the CPU's numbers, and what makes the host wait."""

import copy

import numpy as np
import pytest
import torch
from pretend_cuda import place_of, pretend_cuda
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

HERE, THERE = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def waits():
    with pretend_cuda() as waits:
        yield waits


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- what CUDA refuses and what it allows -----------------------------------------------------------------------------

MIXED = {
    "sum": lambda here, there: here + there,
    "0-dim there": lambda here, there: here + there.sum(),
    "in place, here": lambda here, there: here.add_(there),
    "in place, there": lambda here, there: there.add_(here),
    "in place, 0-dim here": lambda here, there: here.sum().add_(there.sum()),
    "product": lambda here, there: here @ there,
    "cat": lambda here, there: torch.cat([here, there]),
    "stack of 0-dim": lambda here, there: torch.stack([here.sum(), there.sum()]),
    "where": lambda here, there: torch.where(here > 0, there, there),
    "masked_fill": lambda here, there: there.masked_fill(here > 0, 0.0),
    "linear": lambda here, there: F.linear(here, there),
    "embedding": lambda here, there: F.embedding(torch.tensor([1]), there),
    "embedding of 0-dim": lambda here, there: F.embedding(torch.tensor(1), there),
    "index_select": lambda here, there: there.index_select(0, torch.tensor([1])),
    "gather": lambda here, there: there.gather(0, torch.zeros(1, 3, dtype=torch.long)),
    "an index there into a tensor here": lambda here, there: here[torch.tensor([1], device="cuda")],
    "values here into an index there": lambda here, there: there.__setitem__(torch.tensor([1]), here[:1]),
    "equal": lambda here, there: torch.equal(here, there),
    "attention": lambda here, there: F.scaled_dot_product_attention(here[None], there[None], there[None]),
}
ALLOWED = {
    "a number": lambda x, at: x * 2 + 1,
    "0-dim here": lambda x, at: x + torch.tensor(2.0),
    "0-dim here in where": lambda x, at: torch.where(x > 0, x, torch.tensor(2.0)),
    "0-dim here in masked_fill": lambda x, at: x.masked_fill(x > 0, torch.tensor(2.0)),
    "indices here": lambda x, at: x[torch.tensor([2, 0])],
    "indices on two axes": lambda x, at: x[torch.tensor([2, 0]), torch.tensor([1, 1])],
    "a mask here": lambda x, at: x[torch.tensor([True, False, True])],
    "0-dim values": lambda x, at: set_item(x, torch.tensor([2]), torch.tensor(7.0)),
    "values of a slice": lambda x, at: set_item(x, slice(1), torch.zeros(3)),
    "copy_": lambda x, at: x.copy_(torch.arange(9.0).view(3, 3)),
    "as_tensor": lambda x, at: torch.as_tensor(torch.ones(3), device=at) + x,
    "padding": lambda x, at: nn.utils.rnn.pad_sequence([x, x[:1]], batch_first=True),
    "interpolate": lambda x, at: F.interpolate(x[None, None], (5, 5), mode="bicubic", antialias=True),
    "cross entropy": lambda x, at: F.cross_entropy(x, torch.tensor([0, 1, 2], device=at)),
    "made of a shape": lambda x, at: x + torch.arange(3, device=at) + torch.ones_like(x) + x.new_zeros(3),
    "new_tensor": lambda x, at: x + x.new_tensor([1.0, 2.0, 3.0]),
    "another type": lambda x, at: x.to(torch.bfloat16).float() + x.double().type_as(x),
    "out=": lambda x, at: torch.add(x, x, out=torch.empty(3, 3, device=at)),
    "sort": lambda x, at: x.sort(-1, descending=True).values,
}


def set_item(x, index, value):
    x[index] = value
    return x


@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_two_devices_do_not_mix(name):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        MIXED[name](numbers(3, 3), numbers(3, 3).cuda())


@pytest.mark.parametrize("name", ALLOWED)
def test_what_cuda_allows_gives_the_cpus_numbers(name):
    theirs = ALLOWED[name](numbers(3, 3), HERE)
    ours = ALLOWED[name](numbers(3, 3).to("cuda"), THERE)
    assert ours.device == THERE and theirs.device == HERE
    assert ours.dtype == theirs.dtype and torch.equal(ours.cpu(), theirs)


# --- where a tensor is ------------------------------------------------------------------------------------------------


def test_a_tensor_says_where_it_is():
    x, here = torch.zeros(2, device="cuda"), torch.zeros(2)
    assert (x.device, x.is_cuda, x.is_cpu, x.get_device()) == (THERE, True, False, 0)
    assert (here.device, here.is_cuda, here.is_cpu, here.get_device()) == (HERE, False, True, -1)
    assert "cuda:0" in repr(x) and "cuda" not in repr(here)
    with torch.device("cuda"):
        assert torch.ones(2).device == THERE
    assert torch.zeros_like(x, device="cpu").device == HERE and here.new_ones(1, device="cuda:0").device == THERE
    assert torch.empty(2, device="meta").device.type == "meta"


def test_moving_copies_only_from_place_to_place():
    x = numbers(4)
    there = x.to("cuda", torch.float64)
    assert there.device == THERE and there.dtype == torch.float64 and there.to(THERE) is there
    assert there.to(torch.float32).device == there.to(there.new_ones(1)).device == THERE
    assert x.to(there).device == THERE and x.to(there).dtype == torch.float64
    back = there.cpu()
    back.zero_()
    assert back.cpu() is back and there.abs().sum() > 0 and x.device == HERE
    assert copy.deepcopy(there).device == there.device == THERE and copy.deepcopy(x).device == x.device == HERE
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        np.asarray(there)


def test_views_and_writes_stay_where_they_are():
    x = torch.zeros(2, 3, device="cuda")
    row = x[1]
    row += 5
    x.T[0, 0] = 7
    x.view(-1)[1].copy_(torch.tensor(3.0))
    assert x.cpu().tolist() == [[7, 3, 0], [5, 5, 5]]
    assert {t.device for t in (row, x.T, x.view(-1), x.detach(), x.data, *x.unbind(), *x.split(1))} == {THERE}
    here = torch.zeros(3)
    here.copy_(x[1])
    assert here.device == HERE and here.tolist() == [5, 5, 5]


def test_a_place_is_forgotten_with_its_tensor():
    addresses = {torch.zeros(8, device="cuda").data_ptr() for _ in range(20)}
    fresh = [torch.zeros(8) for _ in range(100)]
    assert addresses and all(place_of(x) == "cpu" for x in fresh)


# --- modules and gradients --------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids)))


def tied():
    torch.manual_seed(0)
    return Tied()


def test_modules_move_whole_and_tied_weights_stay_tied():
    module = tied().to("cuda")
    assert {t.device for t in [*module.parameters(), *module.buffers()]} == {THERE}
    assert module.head.weight is module.embed.weight and isinstance(module.head.weight, nn.Parameter)
    assert {t.device for t in copy.deepcopy(module).state_dict().values()} == {THERE}
    module.load_state_dict(tied().state_dict())
    assert module.embed.weight.device == THERE
    assert {t.device for t in module.cpu().state_dict().values()} == {HERE}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_and_a_step_are_the_cpus(checkpointed):
    ids, found = torch.tensor([0, 3, 3, 1]), {}
    for at in (HERE, THERE):
        module = tied().to(at)

        def run(ids, module=module):
            assert ids.device == module.embed.weight.device  # also when it is run again
            return module(ids) * torch.ones(1, device=ids.device)

        logits = checkpoint(run, ids.to(at), use_reentrant=False) if checkpointed else run(ids.to(at))
        F.cross_entropy(logits, ids.to(at)).backward()
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        optimizer.step()
        gradients = [p.grad for p in module.parameters()]
        assert {t.device for t in [*gradients, *module.parameters()]} == {at}
        found[at] = [t.detach().cpu() for t in [*gradients, *module.parameters()]]
    # the optimizer takes other steps on CUDA: all parameters in one call
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*found.values(), strict=True))


def test_a_gradient_goes_back_to_where_the_tensor_was():
    x = numbers(3).requires_grad_()
    (x.to("cuda") * 2).cpu().sum().backward()
    assert x.grad.device == HERE and x.grad.tolist() == [2, 2, 2]


# --- waits ------------------------------------------------------------------------------------------------------------

WAITS = {
    "item": lambda x: x.sum().item(),
    "copy to cpu": lambda x: x.cpu(),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "index by a mask": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x),
    "copy to cuda": lambda x: x.copy_(torch.zeros(3, 3)),
    "unique": lambda x: x.unique(),
}


@pytest.mark.parametrize("name", WAITS)
def test_waits_are_counted(name, waits):
    x = numbers(3, 3)
    WAITS[name](x.clone())
    assert not waits
    x = x.to("cuda")
    assert waits == {"copy to cuda": 1}
    waits.clear()
    WAITS[name](x)
    assert waits == {name: 1}


def test_a_copy_there_that_does_not_block_does_not_wait(waits):
    """Back it does: what it would give otherwise is not there yet."""
    x = numbers(3).to("cuda", non_blocking=True)
    x.copy_(numbers(3), non_blocking=True)
    assert x.device == THERE and numbers(3).cuda(non_blocking=True).device == THERE and not waits
    x.to("cpu", non_blocking=True)
    assert waits == {"copy to cpu": 1}


def test_a_condition_waits_and_a_computation_does_not(waits):
    x = torch.zeros(3, 3, device="cuda")
    y = (x @ x + 1).softmax(-1)[torch.tensor([1])].masked_fill(x[:1] > 0, 0)
    assert not waits
    assert y.sum() > 0 and int(y.argmax()) == 0
    assert waits == {"item": 2}


# --- around it --------------------------------------------------------------------------------------------------------


def test_autocast_of_the_device_is_the_cpus():
    x = torch.ones(3, 3, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16 and torch.is_autocast_enabled("cuda")
        with torch.autocast("cuda", enabled=False):
            assert (x @ x).dtype == torch.float32
    assert not torch.is_autocast_enabled("cuda")


def test_drawing_and_inference_mode_work():
    with torch.inference_mode(), torch.random.fork_rng():
        assert torch.randn(3, device="cuda").softmax(-1).multinomial(1).device == THERE
        assert numbers(2).to("cuda").cpu().device == HERE


def test_all_that_is_replaced_is_put_back():
    places = (torch, torch.Tensor, torch.cuda, torch.autocast, torch.autograd)
    before = [dict(vars(place)) for place in places]
    with pretend_cuda():
        assert [dict(vars(place)) for place in places] != before
    assert [dict(vars(place)) for place in places] == before
