//TILE
var<workgroup> tile_WHICH: array<vec4<f32>, 576>;
//MATRIX
    let m_WHICH = within(record, CONSTANT);
    var WHICH0 = vec4(0.0);
    var WHICH1 = vec4(0.0);
//UNPACK
        let eight_WHICH = expert_eight_NAME(m_WHICH, n, part);
        tile_WHICH[put] = eight_WHICH.low;
        tile_WHICH[put + 1u] = eight_WHICH.high;
//PRODUCTS
            {
                let w0 = tile_WHICH[across + k];
                let w1 = tile_WHICH[across + 144u + k];
                let w2 = tile_WHICH[across + 288u + k];
                let w3 = tile_WHICH[across + 432u + k];
                WHICH0 += vec4(dot(w0, x0), dot(w1, x0), dot(w2, x0), dot(w3, x0));
                WHICH1 += vec4(dot(w0, x1), dot(w1, x1), dot(w2, x1), dot(w3, x1));
            }
