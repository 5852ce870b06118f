{{/* The Jobs: trainer, demo, SFT, reward model. */}}

{{/*
Those fields of a Job's spec that the API server lets nobody change, as far as the chart sets them
(batch/v1: completions, completionMode, selector, podFailurePolicy, successPolicy, backoffLimitPerIndex,
managedBy, template). Takes pod: the text of the template.
*/}}
{{- define "kleash.fixedJobFields" -}}
completions: 1
podFailurePolicy:
  rules:
    # Status 2: the user's input cannot be used, and trying again would not change that.
    - action: FailJob
      onExitCodes:
        operator: In
        values: [2]
    # Evicted, preempted, drained: no fault of the pod.
    - action: Ignore
      onPodConditions:
        - type: DisruptionTarget
          status: "True"
    # Status 143: told to stop, and stopped in order.
    - action: Ignore
      onExitCodes:
        operator: In
        values: [143]
template:
  {{- .pod | nindent 2 }}
{{- end -}}

{{/*
ConfigMap and Job of a component. A hash of all that cannot be changed ends the Job's name: an upgrade
that changes it makes another Job and deletes the old one, whose process writes a checkpoint and ends.
Takes root, component, key, args, config, configFile, ports, readiness.
*/}}
{{- define "kleash.job" -}}
{{- $values := index .root.Values .key -}}
{{- $pod := include "kleash.podTemplate" (merge (dict "restartPolicy" "Never" "grace" $values.terminationGracePeriodSeconds) .) -}}
{{- $fixed := include "kleash.fixedJobFields" (dict "pod" $pod) -}}
{{- $name := include "kleash.name" . -}}
{{- $job := ternary (printf "%s-%s" $name (sha256sum $fixed | trunc 8)) $name .root.Values.hashJobNames -}}
---
apiVersion: v1
kind: ConfigMap
metadata:
  {{- include "kleash.metadata" . | nindent 2 }}
data:
  {{ .configFile }}: |
    {{- .config | nindent 4 }}
---
apiVersion: batch/v1
kind: Job
metadata:
  {{- include "kleash.metadata" (merge (dict "name" $job "labels" (include "kleash.kueueLabels" $values | fromJson)) .) | nindent 2 }}
spec:
  {{- /*
  No `suspend`, with Kueue neither: its admission webhook suspends each Job with a queue's name that is made,
  and from then on Kueue alone switches the field. A manifest that said `true` would stop a Job that runs
  whenever it is applied again, and one that says so at the install alone would start a Job that waits
  at the upgrade, where the field is taken back.
  */}}
  parallelism: 1
  backoffLimit: {{ $values.backoffLimit }}
  {{- with $values.activeDeadlineSeconds }}
  activeDeadlineSeconds: {{ . }}
  {{- end }}
  {{- if not (kindIs "invalid" $values.ttlSecondsAfterFinished) }}
  ttlSecondsAfterFinished: {{ $values.ttlSecondsAfterFinished }}
  {{- end }}
  # One pod at a time: the next one starts when the last one has ended.
  podReplacementPolicy: Failed
  {{- $fixed | nindent 2 }}
{{- end -}}

{{- define "kleash.kueueLabels" -}}
{{- $labels := dict -}}
{{- with .kueue.queueName }}{{ $_ := set $labels "kueue.x-k8s.io/queue-name" . }}{{ end -}}
{{- with .kueue.priorityClass }}{{ $_ := set $labels "kueue.x-k8s.io/priority-class" . }}{{ end -}}
{{- toJson $labels -}}
{{- end -}}
