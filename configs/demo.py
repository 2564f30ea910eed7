"""What `make demo` trains: a small U-Net on the 10,000 embedded Fashion-MNIST images, in a few minutes on a CPU."""

from ml_collections import ConfigDict

from sde_diffusion.training import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.network.base_channels = 32
    config.network.channel_multipliers = (1, 2, 3)
    config.network.blocks_per_level = 1
    config.network.time_scale = 10.0
    config.network.groups = 2
    config.model.sigma_data = 0.8
    config.loss.time.mean, config.loss.time.std = -0.8, 1.4
    config.optim.lr = 2e-3
    config.optim.warmup = 50
    config.ema.decay = 0.99
    config.train.steps = 1300
    config.train.batch_size = 32
    config.train.log_every = 50
    config.train.checkpoint_every = 500
    config.train.sample_every = 0
    return config
