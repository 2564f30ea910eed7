"""Deep NCSN++ under the VE SDE on CIFAR-10 (Song et al. 2021, arXiv:2011.13456): 107.6 M parameters, 950,000 steps.

Give the images as a folder of files: --config.data.path=DIRECTORY.
Published: FID 2.20; not run here.
The published σ is from 0.01 to 50, for images in [0, 1]; here they are in [-1, 1], and it is twice that.
"""

from ml_collections import ConfigDict

from sde_diffusion.networks.published import PUBLISHED
from sde_diffusion.training import default_config, named


def get_config() -> ConfigDict:
    config = default_config()
    config.data = named("image_folder", path="data/cifar10", size=32)
    config.flip = True
    config.sde = named("ve", sigma_min=0.02, sigma_max=100.0)
    config.network = named("unet", **PUBLISHED["ncsnpp_deep_cifar10"].options)
    config.model.prediction = "eps"
    config.loss.weighting = "simple"
    config.loss.time = named("uniform")
    # The published loss is half the sum over the pixels, not the mean: what is compared with a gradient is scaled.
    published_loss = 0.5 * 3 * 32 * 32
    config.optim.lr = 2e-4
    config.optim.warmup = 5000
    config.optim.schedule = "constant"
    config.optim.eps = 1e-8 / published_loss
    config.optim.grad_clip = 1.0 / published_loss
    config.ema.decay = 0.999
    config.train.steps = 950_000
    config.train.batch_size = 128
    return config
