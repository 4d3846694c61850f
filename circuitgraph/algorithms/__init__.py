"""The discovery algorithms: frozen dataclasses of hyper-parameters with one method, `run(engine) -> Outcome`."""

from circuitgraph.algorithms._acdc import ACDC as ACDC
from circuitgraph.algorithms._activation_patching import ActivationPatching as ActivationPatching
from circuitgraph.algorithms._along_paths import AlongPaths as AlongPaths
from circuitgraph.algorithms._attribution_patching import AttributionPatching as AttributionPatching
from circuitgraph.algorithms._eap import EAP as EAP
from circuitgraph.algorithms._eap_ig import EAPIG as EAPIG
from circuitgraph.algorithms._edge_pruning import EdgePruning as EdgePruning
from circuitgraph.algorithms._ensemble import Ensemble as Ensemble
from circuitgraph.algorithms._hisp import HISP as HISP
from circuitgraph.algorithms._information_flow import InformationFlow as InformationFlow
from circuitgraph.algorithms._magnitude import Magnitude as Magnitude
from circuitgraph.algorithms._optimal_ablation import OptimalAblation as OptimalAblation
from circuitgraph.algorithms._path_patching import PathPatching as PathPatching
from circuitgraph.algorithms._per_position import PerPosition as PerPosition
from circuitgraph.algorithms._random import Random as Random
from circuitgraph.algorithms._relp import RelP as RelP
from circuitgraph.algorithms._screened import ScreenedBy as ScreenedBy
from circuitgraph.algorithms._selected import Selected as Selected
from circuitgraph.algorithms._sparse_feature_circuits import SparseFeatureCircuits as SparseFeatureCircuits
from circuitgraph.algorithms._subnetwork_probing import SubnetworkProbing as SubnetworkProbing
from circuitgraph.algorithms._uniform_gradient_sampling import UniformGradientSampling as UniformGradientSampling
