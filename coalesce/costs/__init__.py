"""What work costs on a device, predicted: see `Costs`, and `DEVICES` for the numbers."""

from coalesce.costs.devices import Device as Device, device_of as device_of, DEVICES as DEVICES
from coalesce.costs.model import Costs as Costs
