r"""The one door to diffusers: stock schedulers become Schedules and Grids, stock backbones become Denoisers.

Integer timesteps and alpha-bar exist only here and in `distill.export`. A stock scheduler with N discrete steps numbers
them n = 0 .. N-1, least noise first; our time is t = (n + 1) / N, so that n = t N - 1 and t = 0 is clean data.
"""

from distill.nets.diffusers.backbones import DiT, Stock, UNet2D
from distill.nets.diffusers.conditioned import Conditioned
from distill.nets.diffusers.encoders import Geometry, fingerprints
from distill.nets.diffusers.folder import BACKBONES, CLASSES, FAMILIES
from distill.nets.diffusers.prompts import FirstFrames, Latent, Prompts, decode, encode
from distill.nets.diffusers.schedulers import PREDICTIONS, grid_of, prediction_of, schedule_of, scheduler_of
from distill.nets.diffusers.teacher import load
from distill.nets.diffusers.walk import applicable, cost, walk

__all__ = ["BACKBONES", "CLASSES", "FAMILIES", "PREDICTIONS", "Conditioned", "DiT", "FirstFrames", "Geometry", "Latent",
           "Prompts", "Stock", "UNet2D", "applicable", "cost", "decode", "encode", "fingerprints", "grid_of", "load",
           "prediction_of", "schedule_of", "scheduler_of", "walk"]
