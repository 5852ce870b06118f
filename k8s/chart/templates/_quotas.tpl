{{/* What callers of a server may take, and that trainers go first. */}}

{{/*
Value of server.quotas as a JSON list; empty where the server's own default says the same. The trainer of the
release comes before `quotas` of the values, by the name that servers know it by, and other trainers after
them. Takes root, key: of the values, keys: services.
*/}}
{{- define "kleash.quotas" -}}
{{- $given := (index .root.Values .key).quotas | default list -}}
{{- $named := list -}}
{{- $entries := list -}}
{{- range $given -}}
{{- $named = concat $named .callers -}}
{{- $entry := dict "callers" .callers -}}
{{- range $key, $value := omit . "callers" -}}
{{- $number := ternary (float64 $value) (int64 $value) (has $key (list "prioritySeconds" "queueShare" "maxTokensPerSecond")) -}}
{{- $_ := set $entry (regexReplaceAll "seconds$" (snakecase $key) "s" | replace "per_second" "per_s") $number -}}
{{- end -}}
{{- $entries = append $entries $entry -}}
{{- end -}}
{{- $own := list -}}
{{- range include "kleash.trainerNames" .root | fromJsonArray }}{{ if not (has . $named) }}{{ $own = append $own . }}{{ end }}{{ end -}}
{{- $first := dict "priority_s" 60 "queue_share" 1.25 -}}
{{- $isOwnUsual := true -}}
{{- range $own }}{{ if not (contains "trainer" .) }}{{ $isOwnUsual = false }}{{ end }}{{ end -}}
{{- if not (or (has "reward" .keys) (has "reference" .keys)) -}}
{{- $entries = list -}}
{{- else if or $given (not $isOwnUsual) -}}
{{- $entries = append $entries (merge (dict "callers" (list "*trainer*")) $first) -}}
{{- if $own }}{{ $entries = prepend $entries (merge (dict "callers" $own) $first) }}{{ end -}}
{{- end -}}
{{- toJson $entries -}}
{{- end -}}

{{/* Names of the release's trainer as a caller, as JSON; without authentication what it calls itself. */}}
{{- define "kleash.trainerNames" -}}
{{- if and (eq .Values.auth.mode "none") .Values.trainer.enabled -}}
{{- toJson (list "kleash-trainer") -}}
{{- else -}}
{{- include "kleash.ownCallers" (dict "root" . "callers" (list "trainer")) -}}
{{- end -}}
{{- end -}}
