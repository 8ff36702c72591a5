        if group.x == 0u {
            for (var slot = tid; slot < HIDDEN / 4u; slot += 256u) {
                let unit = slot >> 3u;
                let x = staged[(unit >> 5u) * 256u + (slot & 7u) * 32u + (unit & 31u)] * scale;
                let at = NORMED_AT + 4u * slot;
                scratch[at] = x.x;
                scratch[at + 1u] = x.y;
                scratch[at + 2u] = x.z;
                scratch[at + 3u] = x.w;
            }
        }
