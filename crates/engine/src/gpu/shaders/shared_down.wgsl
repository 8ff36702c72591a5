        let place = dense[2];
        let m = Matrix(place.x, place.y, place.z);
        for (var u = end + lane; u < (count >> 5u); u += 32u) {
            let x = staged_unit(u);
            let at = (start >> 5u) + u - (ROUTED >> 5u);
            //ROW acc$r += dense_dot_SHARED(m, row$r * (SHARED_WIDTH >> 5u) + at, x);
        }
