// STEPS units of a row are asked for at once by each lane, STRIDE by a team. Where a row is no whole number
// of such strides (WHOLE), lanes beyond its end read its last unit, which does not count.

const STRIDE = 32u * STEPS;

fn inside(unit: u32, units: u32) -> u32 {
    if WHOLE {
        return unit;
    }
    return min(unit, max(units, 1u) - 1u);
}

fn counted(value: f32, unit: u32, units: u32) -> f32 {
    if WHOLE {
        return value;
    }
    return select(0.0, value, unit < units);
}
