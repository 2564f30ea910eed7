"""A 2-D spiral with a small multilayer perceptron: seconds on a CPU."""

from ml_collections import ConfigDict

from sde_diffusion.training import default_config, named


def get_config() -> ConfigDict:
    config = default_config()
    config.data = named("spiral")
    config.network = named("mlp", width=128, depth=3, time_scale=10.0)
    config.model.sigma_data = 1.0
    config.optim.lr = 2e-3
    config.optim.warmup = 100
    config.ema.decay = 0.99
    config.train.steps = 3000
    config.train.batch_size = 256
    config.train.log_every = 200
    config.train.checkpoint_every = 1000
    config.train.sample_every = 1000
    config.train.sample_count = 1000
    return config
