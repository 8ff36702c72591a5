// The slabs of a layer's slots: `places[e]` is the slot of expert e, NOWHERE if it has none. A slot holds a
// record.

const NOWHERE = 0xffffffffu;

struct Matrix {
    weight: u32, // in words
    scales: u32, // in scales
    biases: u32, // in scales
}

// Where a matrix lies in a record. Scales of four bytes are counted in words, those of two in halves of
// one: `shift` is 0 or 1.
struct Place {
    weight: u32,
    scales: u32,
    biases: u32,
    shift: u32,
}

@group(1) @binding(0) var<storage, read> places: array<u32>;
//SLABS

var<private> slab: u32;

fn expert_vec(at: u32) -> vec4<u32> {
    //SLAB_VECTOR
}

fn expert_word(at: u32) -> u32 {
    //SLAB_WORD
}

// Points `slab` at an expert's and gives where in it its record starts, in words.
fn find(expert: u32) -> u32 {
    let slot = places[expert];
    slab = slot / SLAB_SLOTS;
    return (slot % SLAB_SLOTS) * SLOT_WORDS;
}

fn within(record: u32, m: Place) -> Matrix {
    let scales = record << m.shift;
    return Matrix(record + m.weight, scales + m.scales, scales + m.biases);
}
