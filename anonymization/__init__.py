"""k-anonymous synthetic fundus photographs: `anonymize` is the whole job."""

from anonymization.job import Release, anonymize
from anonymization.networks import Networks
from anonymization.optimize import OptimizeConfig
from anonymization.settings import Settings

__all__ = ['Networks', 'OptimizeConfig', 'Release', 'Settings', 'anonymize']
