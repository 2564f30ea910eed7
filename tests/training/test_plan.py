"""The plan against counts by hand, real passes, and the formulas it states."""

import math
import re
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from sde_diffusion.cli import main
from sde_diffusion.networks import UNet
from sde_diffusion.networks.account import quantity
from sde_diffusion.training import ConfigError, plan
from sde_diffusion.training.config import resolve_config
from sde_diffusion.training.devices import DEVICES, SHARES, Device, choose_device_type, measure
from sde_diffusion.training.plan import Plan, Workload, _trace, check_devices, estimate

FLOAT = 4  # bytes
ROOT = Path(__file__).parent.parent.parent

# Round figures; a launch takes no time.
ABACUS = Device(
    name="abacus",
    peak={"float32": 1e9},
    memory=1e9,
    bandwidth=1e8,
    within=1e7,
    between=1e6,
    devices_a_node=4,
    price=2.0,
    shares=dict.fromkeys(SHARES, 0.5),
    launch=0.0,
)


class Linear(nn.Module):
    """A layer without bias as a network of (x, t)."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False)

    def forward(self, x, t):
        return self.layer(x)


def unet(**options):
    torch.manual_seed(0)
    return UNet((1, 8, 8), base_channels=16, channel_multipliers=(1, 2), attention_resolutions=(4,), **options)


def settings(**train):
    """Of a small U-Net."""
    network = {"name": "unet", "base_channels": 16, "channel_multipliers": (1, 2), "blocks_per_level": 1}
    return resolve_config({"network": network, "train": {"batch_size": 24, "steps": 100, **train}}).to_dict()


@pytest.fixture(scope="module")
def workload():
    return Workload(unet(), (1, 8, 8), None)


def test_kernels_by_hand():
    width, batch = 8, 5
    kernels = Workload(Linear(width), (width,), None).kernels(batch)
    product, matrix, rows = 2 * batch * width**2, FLOAT * width**2, FLOAT * batch * width
    # x Wᵀ, and the gradient by W; x needs none. The output is held until the second begins, with its gradient.
    assert kernels[:, :2].tolist() == [[product, matrix + 2 * rows], [product, matrix + 2 * rows]]
    workload = Workload(Linear(width), (width,), None)
    assert workload.forward == 1
    slow, fast = replace(ABACUS, peak={"float32": 1.0}), replace(ABACUS, peak={"float32": 1e30})
    assert workload.seconds(batch, slow) == pytest.approx((2 * product, 2 * product))
    traffic = (matrix + 2 * rows) / (0.5 * ABACUS.bandwidth)
    assert workload.seconds(batch, fast) == pytest.approx((traffic, traffic))
    assert workload.seconds(batch, replace(fast, launch=3.0)) == (3.0, 3.0)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_two_batches_give_any(autocast):
    workload, trace = Workload(unet(), (1, 8, 8), autocast), _trace(unet(), (1, 8, 8), 7, autocast)
    assert workload.kinds == trace.kinds
    assert workload.kernels(7).tolist() == [list(map(float, numbers)) for numbers in trace.numbers]


def test_the_flops_are_those_of_the_account(workload):
    flops, costs = workload.kernels(6)[:, 0], workload.costs
    assert flops[: workload.forward].sum() == 6 * costs.forward_flops
    assert flops[workload.forward :].sum() == 6 * costs.backward_flops


@pytest.mark.parametrize("checkpointing", [False, True])
def test_held_bytes_are_those_of_a_real_pass(checkpointing):
    network, batch = unet(checkpointing=checkpointing), 32
    x, t = torch.randn(batch, 1, 8, 8), torch.rand(batch)

    def run():
        output = network(x, t)
        output.backward(torch.ones_like(output))

    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    peak = max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    predicted = Workload(network, (1, 8, 8), None).held_bytes(batch)
    # Above it are a kernel's work space, and what a kernel allocates that fake ones do not.
    assert 0.8 * peak < predicted < 1.05 * peak


def test_gradients_are_averaged_by_ddp_and_scattered_by_fsdp(workload):
    costs, parts, devices = workload.costs, 3, 4
    ddp = estimate(workload, settings(accumulation=parts), ABACUS, devices)
    fsdp = estimate(workload, settings(accumulation=parts, parallel="fsdp"), ABACUS, devices)
    weights, gradients = costs.weight_bytes, costs.gradient_bytes
    assert ddp.images == fsdp.images == 24 // (parts * devices)
    assert ddp.volume == 2 * 3 / 4 * gradients
    assert fsdp.volume == 3 / 4 * (2 * parts * weights + gradients)
    assert ddp.passes == fsdp.passes == pytest.approx(parts * sum(workload.seconds(2, ABACUS)))
    traffic = (3 * (parts - 1) + 10) * gradients + 3 * costs.average_bytes
    assert ddp.update == pytest.approx(traffic / (0.5 * ABACUS.bandwidth))
    assert fsdp.update == pytest.approx(ddp.update / devices)
    assert ddp.step == ddp.passes + ddp.update + ddp.exposed


def test_what_the_passes_do_not_hide_of_communication(workload, monkeypatch):
    monkeypatch.setattr(plan, "_BUCKET", 1000)
    # A node holds four.
    slow = replace(ABACUS, within=1e5, between=1e4)
    for devices, to_next in ((4, 1e5), (8, 1e4)):
        ddp = estimate(workload, settings(), slow, devices)
        assert ddp.exposed == pytest.approx(ddp.volume / to_next - workload.seconds(24 // devices, slow)[1])
        fsdp = estimate(workload, settings(parallel="fsdp"), slow, devices)
        assert fsdp.exposed == pytest.approx(fsdp.volume / to_next - fsdp.passes)


def test_what_nothing_hides_is_the_last_message(workload):
    quick = replace(ABACUS, within=1e12)
    ddp = estimate(workload, settings(), quick, 2)
    # Less than a bucket of 25 MiB.
    assert ddp.exposed == pytest.approx(ddp.volume / 1e12)
    fsdp = estimate(workload, settings(parallel="fsdp"), quick, 2)
    assert fsdp.exposed == pytest.approx(0.5 * workload.largest_unit / 1e12)
    assert 0 < workload.largest_unit < workload.costs.weight_bytes


def test_a_cpu_is_given_its_memory_anew(workload):
    kept, anew = (estimate(workload, settings(accumulation=2), replace(ABACUS, fresh=x), 1) for x in (math.inf, 1e6))
    assert anew.passes - kept.passes == pytest.approx(2 * workload.held_bytes(12) / 1e6)


def test_one_device_sends_nothing(workload):
    one = estimate(workload, settings(), ABACUS, 1)
    assert (one.volume, one.exposed) == (0, 0)
    costs = workload.costs
    assert one.memory.total == costs.training_bytes + workload.held_bytes(24)


def test_memory_is_shared_by_fsdp(workload):
    costs = workload.costs
    averages = resolve_config({**settings(parallel="fsdp"), "ema": {"further_decays": (0.9,), "widths": (0.1,)}})
    memory = estimate(workload, averages.to_dict(), ABACUS, 4).memory
    assert memory.weights == costs.weight_bytes / 4
    assert memory.gradients == costs.gradient_bytes / 4
    assert memory.moments == costs.moment_bytes / 4
    assert memory.averages == 3 * costs.average_bytes / 4
    assert memory.gathered == 3 * workload.largest_unit
    assert memory.activations == workload.held_bytes(6)
    # Those of several parts are added up before they are scattered.
    memory = estimate(workload, settings(parallel="fsdp", accumulation=2), ABACUS, 4).memory
    assert memory.gradients == costs.gradient_bytes


def test_scaling_takes_the_powers_of_two_that_divide_the_batch():
    planned = Plan(settings(accumulation=2), (1, 8, 8), ABACUS, 12)
    assert [one.devices for one in planned.scaling] == [1, 2, 4, 12]
    assert planned.efficiency(planned.scaling[0]) == 1
    last = planned.estimate
    assert planned.efficiency(last) == planned.scaling[0].step / (12 * last.step)
    assert planned.hours(last) == pytest.approx(100 * last.step / 3600)


@pytest.mark.parametrize(
    ("changes", "devices", "message"),
    [
        ({}, 48, r"--devices=48: devices x train.accumulation = 48 x 1 must divide train.batch_size = 24"),
        ({"accumulation": 4}, 12, r"--devices=12: devices x train.accumulation = 12 x 4 must divide"),
        ({}, 0, "--devices=0: must be at least 1"),
        ({"parallel": "fsdp"}, 1, "--devices=1: train.parallel = 'fsdp' shards the weights among at least 2"),
    ],
)
def test_a_step_that_cannot_be_shared(changes, devices, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_devices(settings(**changes), devices)


def test_what_does_not_fit_says_what_to_lower():
    enough = Plan(settings(), (1, 8, 8), ABACUS, 2)
    assert enough.fits
    assert "FIT" not in enough.text()
    memory = enough.estimate.memory
    small = replace(ABACUS, memory=memory.total - memory.activations / 3, peak={"float32": 1e9, "float16": 1e9})
    planned = Plan(settings(), (1, 8, 8), small, 2)
    assert not planned.fits
    text = planned.text()
    assert "IT DOES NOT FIT" in text
    remedies = dict(re.findall(r"^    (\S+ = \S+) +([\d.]+ .B), (?:which fits|still too much)$", text, re.MULTILINE))
    changed = {"train.accumulation = 2": {"accumulation": 2}, "train.parallel = 'fsdp'": {"parallel": "fsdp"}}
    assert remedies.keys() == {*changed, "network.checkpointing = True", "train.precision = 'float16'"}
    for name, change in changed.items():
        total = estimate(planned.workload, settings(**change), small, 2).memory.total
        assert remedies[name] == quantity(total, "B")
        assert f"{remedies[name]}, {'which fits' if total <= small.memory else 'still too much'}\n" in text


def test_devices():
    for device in DEVICES.values():
        assert 0 < device.rate("convolution", torch.float32) < max(device.peak.values())
        assert device.between < device.within < device.bandwidth
        assert 1e9 <= device.memory < 1e12
    # Convolutions in float32 are computed in TensorFloat-32, where it exists, products are not; what is not listed is
    # as float32.
    a100, v100 = DEVICES["a100"], DEVICES["v100"]
    assert a100.rate("convolution", torch.float32) == SHARES["convolution"] * 156e12
    assert v100.rate("convolution", torch.float32) == SHARES["winograd"] * 15.7e12
    assert v100.rate("convolution", torch.float16) == SHARES["convolution"] * 125e12
    assert a100.rate("product", torch.float32) == a100.rate("product", torch.float64) == 0.6 * 19.5e12
    with pytest.raises(ConfigError, match="--device-type=abacus: must be here or one of h100, "):
        choose_device_type("abacus", "float32")
    with pytest.raises(ConfigError, match=r"v100 computes in float32, float16$"):
        choose_device_type("v100", "bfloat16")


def test_measurement_of_what_is_here():
    device = measure("float32")
    # What is measured is the convolution, by whatever algorithm.
    assert set(device.shares) == set(SHARES) - {"winograd"}
    assert max(share for kind, share in device.shares.items() if kind != "memory") == 1
    # No machine that runs this is slower or faster than that.
    assert 1e8 < device.peak["float32"] < 1e16
    assert 1e8 < device.bandwidth < 1e14
    assert 1e-8 < device.launch < 1e-2


def test_plan_command(capsys):
    command = ["plan", f"--config={ROOT / 'configs' / 'cifar10_ddpm.py'}", "--shape=3,16,16", "--device-type=h100"]
    command += ["--config.network.base_channels=16", "--config.network.blocks_per_level=1"]
    assert main([*command, "--devices=16", "--price=4", "--config.train.precision=bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("unet, data of shape (3, 16, 16), in bfloat16, on 16 x H100 SXM 80 GB, by ddp\n")
    cost = re.search(r"800,000 steps: ([\d.]+) hours, ([\d.]+) device-hours, \$([\d.,]+) at \$4 each", printed)
    hours, device_hours, dollars = (float(number.replace(",", "")) for number in cost.groups())
    assert device_hours == pytest.approx(16 * hours, rel=1e-3)
    assert dollars == pytest.approx(4 * device_hours, rel=1e-3)
    assert re.findall(r"^ +(\d+) .*%$", printed, re.MULTILINE) == ["1", "2", "4", "8", "16"]
    assert main([*command, "--devices=16", "--config.train.parallel=fsdp"]) == 0
    assert "by fsdp\n" in capsys.readouterr().out


def test_plan_of_the_shipped_model(capsys):
    assert main(["plan", "--device-type=cpu", "--devices=2"]) == 0
    assert "on 2 x core of a CPU, by ddp" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices=48", "--device-type=h100"], "--devices=48: devices x train.accumulation = 48 x 1 must divide"),
        (["--device-type=gpu"], "--device-type=gpu: must be here or one of h100,"),
        (["--price=-1", "--device-type=cpu"], "--price=-1.0: must be at least 0"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert main(["plan", f"--config={ROOT / 'configs' / 'spiral.py'}", *arguments]) == 2
    assert message in capsys.readouterr().err
