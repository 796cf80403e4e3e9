from distill import config as config
from distill import denoise as denoise
from distill import losses as losses
from distill import methods as methods
from distill import metrics as metrics
from distill import models as models
from distill import noise as noise
from distill import solvers as solvers
from distill import times as times
from distill.denoise import Denoiser as Denoiser
from distill.denoise import Guided as Guided
from distill.errors import BadInput as BadInput
from distill.inspect.results import Run as Run
from distill.inspect.results import evaluate as evaluate
from distill.inspect.results import export_run as export_run
from distill.inspect.results import open_run as open_run
from distill.inspect.results import sample as sample
from distill.inspect.results import train as train
from distill.methods.base import Method as Method
from distill.models.diffusers import load as load
from distill.times import Grid as Grid

__version__: str
__all__: list[str]
