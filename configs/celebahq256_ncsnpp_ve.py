"""NCSN++ under the VE SDE on CelebA-HQ at 256 pixels (Song et al. 2021, arXiv:2011.13456): 65.6 M parameters.

Trained for 2,400,000 steps. Give the images as a folder of files: --config.data.path=DIRECTORY.
Not run here.
The published σ is from 0.01 to 348, for images in [0, 1]; here they are in [-1, 1], and it is twice that.
"""

from ml_collections import ConfigDict

from sde_diffusion.networks.published import PUBLISHED
from sde_diffusion.training import default_config, named


def get_config() -> ConfigDict:
    config = default_config()
    config.data = named("image_folder", path="data/celebahq", size=256)
    config.flip = True
    config.sde = named("ve", sigma_min=0.02, sigma_max=696.0)
    config.network = named("unet", **PUBLISHED["ncsnpp_celebahq_256"].options)
    config.model.prediction = "eps"
    config.loss.weighting = "simple"
    config.loss.time = named("uniform")
    # The published loss is half the sum over the pixels, not the mean: what is compared with a gradient is scaled.
    published_loss = 0.5 * 3 * 256 * 256
    config.optim.lr = 2e-4
    config.optim.warmup = 5000
    config.optim.schedule = "constant"
    config.optim.eps = 1e-8 / published_loss
    config.optim.grad_clip = 1.0 / published_loss
    config.ema.decay = 0.999
    config.train.steps = 2_400_000
    config.train.batch_size = 64
    config.train.parallel = "fsdp"  # for several ranks; on one device, --config.train.parallel=auto
    config.train.sample_count = 16
    return config
