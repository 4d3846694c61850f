"""The discovery algorithms: frozen dataclasses of hyper-parameters with one method, `run(engine) -> Outcome`."""

from circuitgraph.algorithms._acdc import ACDC as ACDC
from circuitgraph.algorithms._activation_patching import ActivationPatching as ActivationPatching
from circuitgraph.algorithms._along_paths import AlongPaths as AlongPaths
from circuitgraph.algorithms._eap import EAP as EAP
from circuitgraph.algorithms._path_patching import PathPatching as PathPatching
