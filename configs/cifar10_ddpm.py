"""DDPM's recipe for CIFAR-10 (Ho et al. 2020, appendix B): 35.7 M parameters, 800,000 steps, for a GPU.

Give the images as a folder of files: --config.data.path=DIRECTORY.
Published: FID 3.17, at most 3.75 bits/dim; not run here.
Times are continuous here, where DDPM has 1000 steps.
"""

from ml_collections import ConfigDict

from sde_diffusion.networks.published import PUBLISHED
from sde_diffusion.training import default_config, named


def get_config() -> ConfigDict:
    config = default_config()
    config.data = named("image_folder", path="data/cifar10", size=32)
    config.flip = True
    config.network = named("unet", **PUBLISHED["ddpm_cifar10"].options)
    config.model.prediction = "eps"
    config.loss.weighting = "simple"
    config.loss.time = named("uniform")
    config.optim.lr = 2e-4
    config.optim.warmup = 5000
    config.optim.schedule = "constant"
    config.optim.grad_clip = 1.0
    config.ema.decay = 0.9999
    config.train.steps = 800_000
    config.train.batch_size = 128
    return config
