"""The discovery algorithms: frozen dataclasses of hyper-parameters with one method, `run(engine) -> Outcome`."""

from circuitgraph.algorithms._acdc import ACDC as ACDC
from circuitgraph.algorithms._activation_patching import ActivationPatching as ActivationPatching
from circuitgraph.algorithms._eap import EAP as EAP
from circuitgraph.algorithms._ensemble import Ensemble as Ensemble
from circuitgraph.algorithms._screened import ScreenedBy as ScreenedBy
from circuitgraph.algorithms._selected import Selected as Selected
