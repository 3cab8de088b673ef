"""Exit 0 when MuJoCo can render without a screen, with the backend that MUJOCO_GL names.

Run in a process of its own: a backend that does not work may abort the interpreter.
"""

from dm_control import mujoco

SCENE = """
<mujoco><worldbody>
  <light pos="0 0 3"/>
  <geom type="sphere" size=".3" rgba="1 0 0 1"/>
  <camera name="front" pos="0 -2 0" xyaxes="1 0 0 0 0 1"/>
</worldbody></mujoco>"""


def main() -> None:
    physics = mujoco.Physics.from_xml_string(SCENE)
    frame = physics.render(height=32, width=32, camera_id="front")
    physics.free()
    red = frame[16, 16].astype(int)
    if not red[0] > red[1] + 50:
        raise SystemExit(f"rendered a frame, but the red ball in its middle has the colour {red.tolist()}")


if __name__ == "__main__":
    main()
