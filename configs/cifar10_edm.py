"""EDM on CIFAR-10, without classes (Karras et al. 2022, arXiv:2206.00364): 55.7 M parameters, 200 M images.

Give the images as a folder of files: --config.data.path=DIRECTORY.
Published: FID 1.97 at 35 evaluations; not run here.
Augmentation, of which the published network is told, is missing here, but for the mirroring.
"""

from ml_collections import ConfigDict

from sde_diffusion.networks.published import PUBLISHED
from sde_diffusion.training import default_config, named


def get_config() -> ConfigDict:
    config = default_config()
    config.data = named("image_folder", path="data/cifar10", size=32)
    config.flip = True
    config.sde = named("edm", sigma_min=0.002, sigma_max=80.0)
    config.network = named("unet", **PUBLISHED["edm_ddpmpp_cifar10"].options)
    config.model.prediction = "edm"
    config.model.sigma_data = 0.5
    config.loss.weighting = "edm"
    config.loss.time = named("log_normal", mean=-1.2, std=1.2)
    batch_size = 512
    config.optim.lr = 1e-3
    config.optim.warmup = 10_000_000 // batch_size
    config.optim.schedule = "constant"
    # The published loss is the sum over the pixels, not the mean: what is compared with a gradient is scaled.
    config.optim.eps = 1e-8 / (3 * 32 * 32)
    config.optim.grad_clip = 0.0
    config.ema.decay = 0.5 ** (batch_size / 500_000)
    config.train.steps = 200_000_000 // batch_size
    config.train.batch_size = batch_size
    return config
