"""Circuits as files: our own JSON, and the circuit files of EAP-IG and of the MIB benchmark."""

from circuitgraph.files._atomic import check_place as check_place
from circuitgraph.files._atomic import parse_json as parse_json
from circuitgraph.files._atomic import read_bytes as read_bytes
from circuitgraph.files._atomic import write_bytes as write_bytes
from circuitgraph.files._json import INLINE_LIMIT as INLINE_LIMIT
from circuitgraph.files._json import SCHEMA as SCHEMA
from circuitgraph.files._json import load as load
from circuitgraph.files._json import save as save
from circuitgraph.files._mib import from_mib as from_mib
from circuitgraph.files._mib import load_any as load_any
from circuitgraph.files._mib import save_mib as save_mib
from circuitgraph.files._mib import to_mib as to_mib
