"""The deployment key, for those who make and check handoffs: see ``lcguard.deployment_key``."""

from __future__ import annotations

from lcguard.deployment_key import KEY_VARIABLE as KEY_VARIABLE
from lcguard.deployment_key import deployment_key as deployment_key
from lcguard.deployment_key import new_key as new_key
