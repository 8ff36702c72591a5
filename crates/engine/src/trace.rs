//! What the forward pass computed, named array by array, for finding a wrong layer.
//!
//! Off unless asked for. Names, shapes and types are those of the reference's golden files, so that
//! a trace and a golden are compared name by name. Arrays of a stage that is run in pieces (chunks
//! of a prompt, steps of a decode) are joined along the token axis.

use std::collections::BTreeMap;

/// Values of one array.
#[derive(Clone, PartialEq, Debug)]
pub enum Values {
    /// Activations.
    F32(Vec<f32>),
    /// Ids.
    I32(Vec<i32>),
}

/// One named array.
#[derive(Clone, PartialEq, Debug)]
pub struct Array {
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// The values, row-major.
    pub values: Values,
}

/// Arrays by name.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Trace {
    /// Finished arrays; `prefill.logits`, `after_decode.delta_state.0` and so on.
    pub arrays: BTreeMap<String, Array>,
}

impl Trace {
    /// Adds a whole array.
    pub fn put(&mut self, name: impl Into<String>, shape: &[usize], values: Values) {
        self.arrays.insert(name.into(), Array { shape: shape.to_vec(), values });
    }
}

/// Collects rows while the model runs; [`Recorder::finish`] joins them into a [`Trace`].
#[derive(Default)]
pub struct Recorder {
    rows: BTreeMap<(&'static str, Option<usize>), Rows>, // by name and, for stages in layers, layer
}

struct Rows {
    width: usize,
    values: Values,
}

impl Recorder {
    /// Adds token rows of `width` to a stage.
    pub fn floats(&mut self, name: &'static str, layer: Option<usize>, width: usize, rows: &[f32]) {
        match &mut self.entry(name, layer, width, Values::F32(Vec::new())).values {
            Values::F32(all) => all.extend_from_slice(rows),
            Values::I32(_) => unreachable!("a stage has one type"),
        }
    }

    /// Adds token rows of ids to a stage.
    pub fn ids(
        &mut self,
        name: &'static str,
        layer: Option<usize>,
        width: usize,
        rows: impl Iterator<Item = i32>,
    ) {
        match &mut self.entry(name, layer, width, Values::I32(Vec::new())).values {
            Values::I32(all) => all.extend(rows),
            Values::F32(_) => unreachable!("a stage has one type"),
        }
    }

    /// Moves everything recorded into `trace` under `prefix.`, layers stacked as the first axis.
    ///
    /// Layers that have no such stage (a dense layer has no router) are filled with zeros, so that
    /// the first axis is always the layer's index.
    pub fn finish(&mut self, prefix: &str, layers: usize, trace: &mut Trace) {
        let rows = std::mem::take(&mut self.rows);
        let mut stacked: BTreeMap<&'static str, Vec<Option<Rows>>> = BTreeMap::new();
        for ((name, layer), rows) in rows {
            match layer {
                None => {
                    let tokens = rows.values.len() / rows.width;
                    trace.put(format!("{prefix}.{name}"), &[tokens, rows.width], rows.values);
                }
                Some(layer) => {
                    let slots = stacked
                        .entry(name)
                        .or_insert_with(|| std::iter::repeat_with(|| None).take(layers).collect());
                    slots[layer] = Some(rows);
                }
            }
        }
        for (name, layers) in stacked {
            let (shape, values) = stack(layers);
            trace.put(format!("{prefix}.{name}"), &shape, values);
        }
    }

    fn entry(
        &mut self,
        name: &'static str,
        layer: Option<usize>,
        width: usize,
        empty: Values,
    ) -> &mut Rows {
        self.rows.entry((name, layer)).or_insert(Rows { width, values: empty })
    }
}

impl Values {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::I32(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn stack(layers: Vec<Option<Rows>>) -> (Vec<usize>, Values) {
    let first = layers.iter().flatten().next().expect("a stage is recorded by at least one layer");
    let (width, len) = (first.width, first.values.len());
    let shape = vec![layers.len(), len / width, width];
    let is_float = matches!(first.values, Values::F32(_));
    let mut floats = Vec::new();
    let mut ids = Vec::new();
    for rows in layers {
        match rows.map(|r| r.values) {
            Some(Values::F32(v)) => floats.extend(v),
            Some(Values::I32(v)) => ids.extend(v),
            None if is_float => floats.extend(std::iter::repeat_n(0.0, len)),
            None => ids.extend(std::iter::repeat_n(0, len)),
        }
    }
    (shape, if is_float { Values::F32(floats) } else { Values::I32(ids) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_join_along_tokens_and_layers_stack() {
        let mut recorder = Recorder::default();
        recorder.floats("embed", None, 2, &[1.0, 2.0]);
        recorder.floats("embed", None, 2, &[3.0, 4.0]);
        recorder.floats("layer", Some(0), 1, &[5.0]);
        recorder.floats("layer", Some(0), 1, &[6.0]);
        recorder.floats("layer", Some(2), 1, &[7.0, 8.0]);
        recorder.ids("router_indices", Some(1), 1, [9, 10].into_iter());
        let mut trace = Trace::default();
        recorder.finish("prefill", 3, &mut trace);
        let array = |name: &str| trace.arrays[name].clone();
        assert_eq!(array("prefill.embed").shape, [2, 2]);
        assert_eq!(array("prefill.embed").values, Values::F32(vec![1.0, 2.0, 3.0, 4.0]));
        assert_eq!(array("prefill.layer").shape, [3, 2, 1]);
        assert_eq!(array("prefill.layer").values, Values::F32(vec![5.0, 6.0, 0.0, 0.0, 7.0, 8.0]));
        let indices = Array { shape: vec![3, 2, 1], values: Values::I32(vec![0, 0, 9, 10, 0, 0]) };
        assert_eq!(array("prefill.router_indices"), indices);
    }
}
