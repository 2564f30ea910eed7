"""Improved DDPM on ImageNet-64, without classes (Nichol & Dhariwal 2021, arXiv:2102.09672): 121 M parameters.

Cosine schedule, learned variances, hybrid loss; 1,500,000 steps.
Give the images as a folder of files of any size: --config.data.path=DIRECTORY. They are scaled and cropped.
Not run here. Times are continuous here, where it has 4000 steps; the bound that trains the variances is theirs.
"""

import math

from ml_collections import ConfigDict

from sde_diffusion.networks.published import PUBLISHED
from sde_diffusion.training import default_config, named


def get_config() -> ConfigDict:
    config = default_config()
    config.data = named("image_folder", path="data/imagenet", size=64)
    config.flip = False
    config.sde = named("cosine", offset=0.008)
    # Twice the data's channels are what learned variances ask for by themselves.
    options = PUBLISHED["improved_ddpm_imagenet64"].options
    config.network = named("unet", **{name: value for name, value in options.items() if name != "out_channels"})
    config.model.prediction = "eps"
    config.model.learned_variance = True
    # A thousandth of the bound in bits, as in the public code; the weight here is on nats.
    config.loss.weighting = named("hybrid", steps=4000, vlb_weight=1e-3 / math.log(2))
    config.loss.time = named("uniform")
    config.optim.lr = 1e-4
    config.optim.warmup = 0
    config.optim.schedule = "constant"
    config.optim.grad_clip = 0.0
    config.ema.decay = 0.9999
    config.train.steps = 1_500_000
    config.train.batch_size = 128
    config.train.parallel = "fsdp"  # for several ranks; on one device, --config.train.parallel=auto
    return config
