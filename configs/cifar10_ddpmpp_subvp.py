"""Deep DDPM++ under the sub-VP SDE on CIFAR-10 (Song et al. 2021, arXiv:2011.13456): 106.6 M parameters, 950,000 steps.

Give the images as a folder of files: --config.data.path=DIRECTORY.
Published: FID 2.41, 2.99 bits/dim; not run here.
Times start at t_min = 0.006, where σ is a thousandth of α, and not at the published 1e-5.
"""

from ml_collections import ConfigDict

from sde_diffusion.networks.published import PUBLISHED
from sde_diffusion.training import default_config, named


def get_config() -> ConfigDict:
    config = default_config()
    config.data = named("image_folder", path="data/cifar10", size=32)
    config.flip = True
    config.sde = named("subvp", beta_min=0.1, beta_max=20.0)
    config.network = named("unet", **PUBLISHED["ddpmpp_deep_cifar10"].options)
    config.model.prediction = "eps"
    config.loss.weighting = "simple"
    config.loss.time = named("uniform")
    config.optim.lr = 2e-4
    config.optim.warmup = 5000
    config.optim.schedule = "constant"
    config.optim.grad_clip = 1.0
    config.ema.decay = 0.9999
    config.train.steps = 950_000
    config.train.batch_size = 128
    return config
