"""Fashion-MNIST by class, for a CPU: the model that ships with the package, with the ten classes told to it.

A tenth of the labels is hidden, so that the same network knows the images of all classes together: what guidance
without a classifier needs (Ho & Salimans 2022, arXiv:2207.12598). `sample --label=K` draws from a class.

The model that ships has been trained on the 60,000 images of the whole data set, up to step 10,000.
The data are the 10,000 images in the package, or with --config.data.path=FOLDER those of the four original files.
"""

from ml_collections import ConfigDict

from sde_diffusion.training import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.network.base_channels = 32
    config.network.channel_multipliers = (1, 2, 3)
    config.network.blocks_per_level = 1
    config.network.time_scale = 10.0
    # Few wide groups: on a CPU, in channels_last, normalisation is then faster.
    config.network.groups = 2
    config.network.classes = 10
    config.model.sigma_data = 0.8  # root mean square of the pixels in [-1, 1]
    config.loss.time.mean, config.loss.time.std = -1.6, 1.6
    config.optim.lr = 1e-3
    config.optim.warmup = 500
    config.ema.decay = 0.999
    config.train.label_dropout = 0.1
    config.ema.widths = (0.05, 0.10)
    config.ema.snapshot_every = 500
    config.train.steps = 14_000
    config.train.batch_size = 64
    config.train.precision = "bfloat16"
    config.train.checkpoint_every = 500
    config.train.sample_every = 2000
    return config
