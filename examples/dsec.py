"""DSEC's calibration: where its events lie in its images, for things far away. It is of `convert.py`.

Glossary
    map              (h, w, 2), where a pixel of the event camera lies once its lens is undone: xr, yr = map[y, x]
    H                (3, 3), from there to the frame camera's rectified image, the homography at infinity
    camera           left or right, of the events and of the image, whose numbers are: 0 events left, 1 image left, 2
                     image right, 3 events right
"""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import reading
from events import Events, land, need

OTHER = {"left": "right", "right": "left"}  # camera


@dataclass(frozen=True, eq=False)
class Rectification:
    """How events get to an image of `size` (width, height) in pixels."""

    map: np.ndarray  # (h, w, 2)
    H: np.ndarray  # (3, 3)
    size: tuple[int, int]

    def lands(self, events: Events) -> np.ndarray:
        """Where each event lies in the image, as `events.land` says. Raises ValueError for events outside the map."""
        (height, width, _), (left, right, top, bottom) = self.map.shape, events.extent
        told = f"{events.name}: covers x {left} to {right} and y {top} to {bottom}, the map {width} x {height} pixels"
        need(min(left, top) >= 0 and right < width and bottom < height, f"{told}; give the map of this camera")
        row, column = (values.astype(np.int64) for values in (events.y, events.x))  # text and some HDF5 have floats
        return land(self.H, *self.map[row, column].T, self.size)


def at_infinity(calibration: dict, camera: str) -> np.ndarray:
    """H = K R T R^T K^-1: first K and R of the image, last those of the events, between them the rotation from events
    to image. T_10 leads from 0 to 1, T_32 from 2 to 3. calibration: what cam_to_cam.yaml holds."""
    turns = {key: np.array(each, dtype=np.float64)[:3, :3] for key, each in calibration["extrinsics"].items()}
    frame, event, T = (1, 0, turns["T_10"]) if camera == "left" else (2, 3, turns["T_32"].T)
    lenses = [calibration["intrinsics"][f"camRect{number}"]["camera_matrix"] for number in (frame, event)]
    K, K_event = (np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]) for fx, fy, cx, cy in lenses)
    return K @ turns[f"R_rect{frame}"] @ T @ turns[f"R_rect{event}"].T @ np.linalg.inv(K_event)


def read_rectification(map: Path, calibration: Path, camera: str) -> Rectification:
    """From rectify_map.h5 and cam_to_cam.yaml. Raises ValueError that names the file. Warns of a map that seems to be
    of the other camera."""
    other, words = OTHER[camera], re.split(r"[^a-z]+", str(map.resolve()).lower())
    if other in words and camera not in words:
        warnings.warn(f"{map}: is it the {other} camera's? camera is {camera}", stacklevel=2)
    with reading(map):
        import h5py

        with h5py.File(map) as file:
            pixels = file["rectify_map"][:]
        need(pixels.ndim == 3 and pixels.shape[2] == 2, f"{map}: rectify_map is {pixels.shape}, not (height, width, 2)")
    with reading(calibration):
        import yaml

        numbers = yaml.safe_load(calibration.read_text(encoding="utf-8"))
        frame = numbers["intrinsics"]["camRect1" if camera == "left" else "camRect2"]
        width, height = frame.get("resolution", (1440, 1080))
        return Rectification(pixels, at_infinity(numbers, camera), (int(width), int(height)))
